"""An adapter read from disk: onto a model that is planned, patched and filled from the file alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, overload

import torch
from torch import nn

from ..lang.diagnostics import Diagnostic, Error
from ..patch.apply import apply_plan
from ..patch.drift import unwrapped
from ..patch.original import unmarked
from ..patch.over_ranks import over_ranks, parts
from ..patch.patch import Patch, patches
from ..plan.plan import Plan
from ..tree.tree import Tensor, Tree
from .base import check_base
from .fill import fill, random_state_kept, warn_of_moved
from .fit import for_patch
from .manifest import Manifest
from .mapped.load import load_base, maps_of
from .pair import JSON
from .saved import Saved
from .tensors import (
    Named,
    base_place,
    check,
    journal_of,
    on_meta,
    tensor_at,
)


@overload
def load_adapter(
    model: nn.Module,
    directory: str | PathLike[str],
    *,
    adapter: str | None = None,
    allow_import: str | Sequence[str] = (),
) -> Patch: ...
@overload
def load_adapter(
    model: Sequence[nn.Module],
    directory: str | PathLike[str],
    *,
    adapter: str | None = None,
    allow_import: str | Sequence[str] = (),
) -> list[Patch]: ...
def load_adapter(
    model: nn.Module | Sequence[nn.Module],
    directory: str | PathLike[str],
    *,
    adapter: str | None = None,
    allow_import: str | Sequence[str] = (),
) -> Patch | list[Patch]:
    """Apply the adapter in `directory` (what `save_adapter` wrote) to `model`, from the file alone.

    The model must be the base that it was trained on: the modules with weights, their classes, shapes and ties. Dtypes
    may differ; factors take the place that the plan gives them here. `adapter` gives it another name than it was saved
    under, beside one that is there. A model that carries this very patch gets the weights alone. `allow_import` permits
    what `replace` and `wrap` import; that the file records what was permitted when it was made counts for nothing.

    Base weights that trained with the adapter are loaded too; `revert()` gives the old ones back.

    Of a megatron-core model over ranks it is called on each, with its part or the list of its virtual chunks, whatever
    the layout of ranks that the adapter was trained on; it gives a list for a list.

    Raises `Error` where the files cannot be read (GP601 to GP603), the base differs (GP611 with the difference, GP618),
    the rules mean something else here (GP613), names, shapes or types do not agree (GP614, GP615), `adapter` has no
    effect (GP619), or the model is on the meta device (GP616); `PlanError` and `ApplyError` as `apply` does. The model
    is then as it was before.
    """
    if isinstance(allow_import, str):
        allow_import = (allow_import,)  # as a sequence its `*` alone would permit everything
    if isinstance(model, (list, tuple, nn.ModuleList)) and len(model) == 1:
        return [load_adapter(model[0], directory, adapter=adapter, allow_import=allow_import)]
    elsewhere = over_ranks(model, "load_adapter")
    if elsewhere is not None:
        return elsewhere(model, directory, adapter, allow_import)  # type: ignore[no-any-return]
    assert isinstance(model, nn.Module)
    root = unwrapped(model)
    saved = Saved.read(directory)
    tree = Tree.of(model)
    check_base(saved.made_on, tree, saved.keys, saved.folder)
    saved.check_content(tree)
    clean = unmarked(tree)
    name = saved.manifest.adapter if adapter is None else adapter
    recorded = saved.plan(clean, saved.manifest.adapter, allow_import)
    saved.check_changes(recorded)
    tensors = renamed(saved, recorded, clean, name)

    here = [patch for patch in patches(root) if patch.model is root]
    same = next((patch for patch in here if is_of(patch, saved.manifest, name)), None)
    if same is not None:
        fill(same, tensors, saved.folder)
        return same
    plan = recorded if name == saved.manifest.adapter and not tree.marks else saved.plan(tree, name, allow_import)
    _check_plan(plan, tensors, saved)
    moved = [key for key in saved.manifest.tensors.base if key in tensors]
    if here and moved:
        warn_of_moved(saved.folder, moved)
    with random_state_kept(root):
        patch = apply_plan(plan, model, initialise=False)
    try:
        fill(patch, tensors, saved.folder, remember=moved)
    except BaseException:
        patch.revert()
        raise
    return patch


def load_weights(
    patch: Patch | Sequence[Patch], source: str | PathLike[str] | Mapping[str, torch.Tensor], *, fit: bool = False
) -> None:
    """Put an adapter's weights into a patch that is there, or the weights of a whole checkpoint: all, or none.

    A checkpoint (safetensors files, or with rules that have `map` statements a state dict of such names) is that of the
    family that the rules' maps read: see `graphpatch.checkpoint.mapped`. Of a megatron-core model `patch` may be the
    patches of its virtual chunks, as `apply` gave them; then it is called on every rank, and each reads its own part.

    An adapter is a directory of `save_adapter`, or a state dict: everything that the patch added, by the names of
    `patch.adapter_state_dict()`, and base weights if need be. Neither base nor rules are compared, only names, shapes,
    types and the scale; floats of another precision are cast. Weights keep their device, and are written in place, so
    that an optimizer or a compiled model goes on with them, and nothing is compiled anew.

    With `fit`, a directory may hold an adapter of a lower rank, of another scale and name, or on fewer of the modules:
    zeros fill up the rest, and B takes the ratio of the scales, so that the patch computes what the adapter would.

    Raises `Error`: GP601 to GP603 for files, GP614 for missing and unexpected names, GP615 for shapes and types, GP529
    for another scale, or with `fit` where the adapter does not fit into the patch.
    """
    every = parts(patch)
    patch = every[0]
    journal_of(patch)
    if _is_checkpoint(patch, source):
        load_base(every, source)
        return
    if isinstance(source, Mapping):
        if fit:
            fix = "a directory of save_adapter says them: load_weights(patch, dir, fit=True)"
            raise Error(Diagnostic("GP529", "a state dict does not say the rank and scale it is of", fixes=(fix,)))
        if len(every) > 1:
            title = f"a state dict of an adapter is one patch's, and here are {len(every)}"
            raise Error(Diagnostic("GP529", title, fixes=("load_weights(patch, its state dict), one after another",)))
        fill(patch, dict(source), "the state dict")
        return
    elsewhere = over_ranks(patch.model if len(every) == 1 else [one.model for one in every], "load_weights")
    if elsewhere is not None:
        elsewhere(every, source, fit)
        return
    saved = Saved.read(source)
    name = patch.record["adapter"]
    tensors: Named = saved.tensors
    if patch.record["rules"] != saved.manifest.rules:
        tensors = for_patch(saved, patch, fit)
    elif name != saved.manifest.adapter:
        clean = unmarked(Tree.of(patch.model))
        tensors = renamed(saved, saved.plan(clean, saved.manifest.adapter, ()), clean, name)
    fill(patch, tensors, saved.folder)


def _is_checkpoint(patch: Patch, source: str | PathLike[str] | Mapping[str, torch.Tensor]) -> bool:
    """Whether it is a model's, and no adapter's."""
    if not isinstance(source, Mapping):
        path = Path(source)
        if path.is_file():
            return path.suffix in (".safetensors", ".json")
        return not (path / JSON).exists() and any(not p.name.startswith("adapter") for p in path.glob("*.safetensors"))
    brought = patch.adapter_state_dict()
    return not (brought and brought.keys() <= source.keys()) and maps_of(patch)


def is_of(patch: Patch, manifest: Manifest, adapter: str | None) -> bool:
    return patch.record["adapter"] == adapter and patch.record["rules"] == manifest.rules


def renamed(saved: Saved, recorded: Plan, clean: Tree, name: str | None) -> Named:
    """The tensors, under the names that they have where the adapter is called `name`."""
    if name == saved.manifest.adapter:
        return saved.tensors
    names: dict[str, str] = {}
    for old, new in zip(recorded.steps, saved.plan(clean, name, ()).steps):
        for node in old.nodes:
            path = f"{clean.paths[node]}." if node else ""
            names |= {path + a: path + b for a, b in zip(old.adds, new.adds) if a != b}
    if not names:
        raise Error(
            Diagnostic(
                "GP619",
                f'adapter="{name}" has no effect: nothing that {saved.folder} adds takes its name from there',
                fixes=("leave it out; rules that name their adapters themselves keep those names",),
            )
        )
    return {names.get(key, key): tensor for key, tensor in saved.tensors.items()}


def _check_plan(plan: Plan, tensors: Named, saved: Saved) -> None:
    """All that can be known before the model is touched: what modules that are put in hold is known afterwards."""
    tree = plan.tree
    expected: dict[str, Any] = {}
    for step in plan.steps:
        for node in step.nodes:
            path = f"{tree.paths[node]}." if node else ""
            expected |= {path + name: tensor for name, tensor in step.adds.items()}
    for key in saved.manifest.tensors.base:
        place = base_place(tree, key)
        held = None if place is None else tensor_at(place)
        if held is not None:
            if held.is_meta:
                raise on_meta(key)
            expected[key] = Tensor(tuple(held.shape), str(held.dtype).removeprefix("torch."))
    opaque = any(step.op.exclusive for step in plan.steps)
    check({k: t for k, t in tensors.items() if k in expected} if opaque else tensors, expected, saved.folder)
    for step in plan.steps:
        for node in step.nodes if step.adds else ():
            weight = next(iter(tree.modules[node].parameters()), None) if tree.modules else None
            if weight is not None and weight.is_meta:
                raise on_meta(f"{tree.paths[node]}.{next(iter(step.adds))}")
