"""What an adapter makes of which weights, from its files alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import torch

from ...lang.diagnostics import Diagnostic, Error
from ...ops.quantize import Quantize
from ...patch.imports import load_rewrite
from ...plan.plan import Plan, Step
from ...rewrites.merging import Merging, Unmergeable, in_order
from ...tree.tree import Tree
from ..base import weight_shape
from ..saved import Saved

Shape = tuple[int, ...]


@dataclass
class Updates:
    """What becomes of the base's weights, by the names that the model has them under."""

    what: str
    """The adapter's folder."""
    names: dict[str, tuple[str, ...]]
    """All names of each parameter of the model, by the first: a tied one has several."""
    shapes: dict[str, Shape]
    """Of each parameter, by the first name; as they are when they are not packed."""
    mergings: dict[str, list[Merging]] = field(default_factory=dict)
    values: dict[str, torch.Tensor] = field(default_factory=dict)
    """Weights of the base that trained with the adapter, and take the place of what is there."""


def updates_of(directory: str | PathLike[str]) -> Updates:
    """The updates of an adapter that `save_adapter` wrote.

    Raises `Error`: GP601 to GP603, GP613 where it cannot be read or means something else by now, GP644 for an op that
    is no change of weights.
    """
    saved = Saved.read(directory)
    plan = saved.plan(saved.made_on, saved.manifest.adapter, ())
    saved.check_changes(plan)
    updates = planned_updates(saved.folder, plan, {key: saved.tensors[key] for key in saved.manifest.tensors.added})
    for key in saved.manifest.tensors.base:
        updates.values[key.removeprefix("^")] = saved.tensors[key]
    return updates


def planned_updates(what: str, plan: Plan, tensors: Mapping[str, torch.Tensor]) -> Updates:
    """What a plan does to the weights, with the values of all that it adds, by the names in a model. Each is used."""
    tree = plan.tree
    names = {}
    shapes = {}
    for node in range(len(tree)):
        signature = tree.signature(node)
        for name in signature.parameters:
            if (node, name) not in tree.first_of:
                paths = tree.parameter_paths((node, name))
                names[paths[0]] = tuple(paths)
                shapes[paths[0]] = weight_shape(signature, name)
    updates = Updates(what, names, shapes)
    first = {alias: one for one, aliases in names.items() for alias in aliases}
    used: set[str] = set()
    for step in plan.steps:
        if isinstance(step.op, Quantize):
            continue  # the files have the weight as it was before, which is better to merge into
        rewrite, entry = _rewrite(step)
        if step.op.shares and not step.adds:
            continue  # the weight is another module's first, and changes there
        for node in step.nodes:
            path = f"{tree.paths[node]}." if node else ""
            used.update(path + name for name in step.adds)
            absent = next((name for name in step.adds if path + name not in tensors), None)
            if absent is not None:
                why = f"its `{absent}` is in no file, but worked out from the base's weights"
                raise _cannot(step, path.removesuffix("."), why)
            values = {name: tensors[path + name] for name in step.adds}
            try:
                found = rewrite.merging(entry, values, dict(_shapes_below(tree, node)))
            except Unmergeable as error:
                raise _cannot(step, path.removesuffix("."), str(error), *error.fixes) from None
            for name, merging in found.items():
                updates.mergings.setdefault(first[path + name], []).append(merging)
    for path, mergings in updates.mergings.items():
        try:
            updates.mergings[path] = in_order(mergings)
        except Unmergeable as error:
            raise _cannot(plan.steps[0], path, str(error), *error.fixes) from None
    left = [key for key in tensors if key not in used]
    if left:
        title = f"{len(left)} tensors of {what} belong to nothing that its rules add, first `{left[0]}`"
        raise Error(Diagnostic("GP644", title, fixes=("save the adapter anew",)))
    return updates


def _rewrite(step: Step) -> tuple[Any, Any]:
    if not step.op.merges:
        raise _cannot(step, "", "it is no change of weights")
    rewrite = load_rewrite(step.rewrite, step.rule)
    return rewrite, rewrite.entry(step.op) if step.parameter is None else rewrite.entry(step.op, step.parameter)


def _shapes_below(tree: Tree, node: int) -> Iterator[tuple[str, Shape]]:
    """Of the parameters of a module and of what is in it, by their names from there."""
    start = len(tree.paths[node]) + 1 if node else 0
    for below in range(node, tree.ends[node]):
        path = tree.paths[below][start:]
        for name, tensor in tree.signature(below).parameters.items():
            yield (f"{path}.{name}" if path else name), tuple(tensor.shape)


def _cannot(step: Step, path: str, why: str, *fixes: str) -> Error:
    where = f" on `{path}`" if path else ""
    return Error(
        Diagnostic(
            "GP644",
            f"{step.op.text()}{where} cannot be merged into a checkpoint: {why}",
            text=(step.rule,),
            fixes=fixes
            or ("load the adapter onto the model: load_adapter(model, DIR) or load_peft; then patch.bake()",),
        )
    )
