"""An adapter of PEFT onto a model: planned from its config, held against its weights, then applied and filled."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from os import PathLike, fspath

import torch
from torch import nn

from ...lang.diagnostics import Diagnostic, Error
from ...patch.apply import apply_plan
from ...patch.drift import unwrapped
from ...patch.original import unmarked
from ...patch.patch import Patch, patches
from ...plan.freeze import TRAIN
from ...plan.plan import Plan
from ...plan.ruleset import RuleSet
from ...tree.tree import Tree
from ..fill import fill, random_state_kept, warn_of_moved
from ..tensors import Named, base_place, on_meta, tensor_at
from .config import LoraConfig, read_config
from .files import read_tensors
from .keys import PREFIX, adapted, adapter_path, base_name, canonical, peft_key
from .layout import ours
from .names import Named as NamedTarget
from .names import asks_for_names, module_paths, of_name
from .rules import rule_set, rules_of_names, rules_text
from .shift import Moved, moved_to
from .unfused import fused

_SHOWN = 6


def load_peft(model: nn.Module, directory: str | PathLike[str], *, adapter: str | None = None) -> Patch:
    """Apply the LoRA adapter of PEFT in `directory` (`adapter_config.json`, `adapter_model.safetensors`) to `model`.

    What its config means is planned as `from_peft` has it, and every tensor of the file must reach a module: keys too
    many, too few, or of another shape are an error with their number. `modules_to_save` and biases become the base's
    weights; `revert()` gives the old ones back. `adapter` names it, beside one that is there.

    Raises `Error`: GP621 and GP622 where the files cannot be read or followed, GP623 where names, GP624 where shapes do
    not agree, GP628 where a saved module is tied to another; `PlanError` and `ApplyError` as `apply` does. The model is
    then as it was before.
    """
    tree = Tree.of(model)
    file = _File.read(directory, tree)
    rules = file.rules()
    clean = rules.plan(unmarked(tree), adapter=adapter)
    added, base = file.fitted(clean)
    plan = rules.plan(tree, adapter=adapter) if tree.marks else clean
    return _applied(plan, model, added, base, file.what)


def planned(directory: str | PathLike[str], tree: Tree) -> tuple[Plan, Named, Named]:
    """The same without a model that has weights: what is planned on a tree, the values of what that adds, and all base
    weights that the file brings. Raises `Error` as `load_peft` does."""
    file = _File.read(directory, tree, bare=True)
    plan = file.rules().plan(tree)
    return plan, *file.fitted(plan)


def _applied(plan: Plan, model: nn.Module, added: Named, base: Named, what: str) -> Patch:
    root = unwrapped(model)
    here = [patch for patch in patches(root) if patch.model is root]
    if here and base and all(patch.id != plan.id for patch in here):
        warn_of_moved(what, list(base))
    # Where the factors are told from what they started from, that is worked out from the base, and in no file.
    started = any(tensor.buffer for step in plan.steps for tensor in step.adds.values())
    with random_state_kept(root):
        patch = apply_plan(plan, model, initialise=started)
    try:
        rest = {key: value for key, value in patch.adapter_state_dict().items() if key not in added}
        fill(patch, {**rest, **added, **base}, what, remember=list(base))
    except BaseException:
        if patch not in here:
            patch.revert()
        raise
    return patch


def _canonical(tensors: Mapping[str, torch.Tensor], what: str) -> Named:
    found: Named = {}
    for key, tensor in tensors.items():
        if found.setdefault(canonical(key), tensor) is not tensor:
            raise Error(Diagnostic("GP623", f"{what} has `{canonical(key)}` twice", text=(f"once as {key}",)))
    return found


@dataclass(frozen=True)
class _File:
    what: str
    config: LoraConfig
    tensors: Named
    """By canonical key."""
    moved: Moved | None = None
    """Where the modules of the file stand in this model, if not where they stood when it was saved."""
    bare: bool = False
    """The base's weights are not there to compare with."""
    tied: frozenset[str] = frozenset()
    """Modules of the file that have one weight here."""
    experts: tuple[NamedTarget, ...] = ()
    """Stacks of experts that the file has one by one."""

    @classmethod
    def read(cls, directory: str | PathLike[str], tree: Tree, bare: bool = False) -> _File:
        what, config = fspath(directory), read_config(directory)
        tensors = _canonical(read_tensors(directory), what)
        moved = moved_to(tree, [path for key in tensors if (path := adapter_path(key)) is not None])
        if moved is not None:
            warnings.warn(moved.warning(what), stacklevel=3)
            tensors = {PREFIX + moved.here(key.removeprefix(PREFIX)): value for key, value in tensors.items()}
            return cls(what, config, tensors, moved, bare)
        stacks = fused(config, tensors, tree, what)
        tensors, experts = (tensors, []) if stacks is None else stacks
        nowhere = [
            key for key in tensors if (path := adapter_path(key)) and tree.find(path.replace(".base_layer", "")) is None
        ]
        if nowhere:
            raise _misfit(what, [], nowhere, len(tensors))
        return cls(what, config, tensors, None, bare, _tied(tree, tensors), tuple(experts))

    def rules(self) -> RuleSet:
        if self.moved is None and not self.experts and not self.tied and not asks_for_names(self.config):
            return rule_set(rules_text(self.config, self.what, loading=True))
        here, there = (self.moved.here, self.moved.there) if self.moved else (str, str)
        stacked = {one.name.rpartition(".")[0] for one in self.experts}
        paths = [path for path in module_paths(self.config, self.tensors) if path not in stacked]
        named = [of_name(self.config, there(path))._replace(name=here(there(path))) for path in paths]
        return rule_set(rules_of_names(self.config, self.what, named, self.experts, tied=self.tied))

    def fitted(self, plan: Plan) -> tuple[Named, Named]:
        """What the plan adds, and base weights, by our names and in our layout. Raises `Error`."""
        targets = adapted(plan)
        wanted = {one.key(added) for one in targets for added in one.names if not _is_start(added)}
        base = {name: key for key in self.tensors if (name := self._base(plan.tree, key, wanted)) is not None}
        trained = _trained(plan)
        there = {_first_name(plan.tree, name) for name in base}
        missing = [key for key in wanted if key not in self.tensors]
        missing += [peft_key(*_split(name)) for name in sorted(trained - there)]
        unexpected = [key for key in self.tensors if key not in wanted and key not in base.values()]
        if missing or unexpected:
            raise _misfit(self.what, missing, unexpected, len(self.tensors))
        added: Named = {}
        wrong: list[str] = []
        shapes = {one.names[name]: shape for one in targets for name, shape in one.shapes.items()}
        for one in targets:
            found = ours(one, {a: self.tensors[one.key(a)] for a in one.names if not _is_start(a)})
            for name, tensor in found.items():
                shape = shapes[one.names[name]]
                if tuple(tensor.shape) != shape:
                    wrong.append(f"{one.key(name)}: {_shape(tensor)}, and here it is {list(shape)}")
                elif not tensor.is_floating_point():
                    wrong.append(f"{one.key(name)}: {tensor.dtype}, and no floats")
                if added.setdefault(one.names[name], tensor) is not tensor and not added[one.names[name]].equal(tensor):
                    raise self._untied(one.path)
        moved = self._moved(plan.tree, base, trained, wrong)
        if wrong:
            raise self._misshapen(wrong)
        return added, moved

    def _base(self, tree: Tree, key: str, wanted: set[str]) -> str | None:
        """The name in the model of a tensor that belongs to the base."""
        name = base_name(key)
        return name if key not in wanted and base_place(tree, name) is not None else None

    def _moved(self, tree: Tree, base: Mapping[str, str], trained: set[str], wrong: list[str]) -> Named:
        """The base weights that are others than those that are there."""
        moved: Named = {}
        for name, key in base.items():
            place = base_place(tree, name)
            held, value = tensor_at(place) if place else None, self.tensors[key]
            assert held is not None
            if held.is_meta and not self.bare:
                raise on_meta(name)
            if held.shape != value.shape:
                wrong.append(f"{key}: {_shape(value)}, and the model has {_shape(held)}")
            elif self.bare or _first_name(tree, name) in trained or not torch.equal(held.cpu(), value.to(held.dtype)):
                moved[name] = value
        if not wrong:
            self._refuse_tied(tree, moved)
        return moved

    def _refuse_tied(self, tree: Tree, moved: Named) -> None:
        """In PEFT a saved module is a copy; here the weight is one, so that what is tied to it would change too."""
        for name, value in moved.items():
            place = tree.find_parameter(name)
            if place is None:
                continue
            first = tree.first_of.get(place, place)
            others = [p for p in tree.parameter_paths(first) if p != name]
            apart = [p for p in others if p not in moved or not torch.equal(moved[p], value)]
            if apart:
                raise Error(
                    Diagnostic(
                        "GP628",
                        f"`{name}` has weights of its own in {self.what}, and here it is tied to `{apart[0]}`",
                        text=("loading them would change the other too, which PEFT's copy does not",),
                        fixes=("untie it first: module.weight = nn.Parameter(module.weight.detach().clone())",),
                    )
                )

    def _untied(self, path: str) -> Error:
        title = f"`{path}` has an adapter of its own in {self.what}, and here its weight is tied to another's"
        why = "PEFT lets the two drift apart, and one weight cannot be two"
        fix = "untie them first: module.weight = nn.Parameter(module.weight.detach().clone())"
        return Error(Diagnostic("GP628", title, text=(why,), fixes=(fix,)))

    def _misshapen(self, wrong: list[str]) -> Error:
        more = [f"and {len(wrong) - _SHOWN} more"] if len(wrong) > _SHOWN else []
        title = (
            f"{len(wrong)} of {len(self.tensors)} tensors of {self.what} have another shape or type than this model's"
        )
        return Error(Diagnostic("GP624", title, text=(*wrong[:_SHOWN], *more)))


def _tied(tree: Tree, keys: Iterable[str]) -> frozenset[str]:
    """The modules with an adapter whose weight is that of another one with an adapter."""
    by_weight: dict[tuple[int, str], list[str]] = {}
    for path in dict.fromkeys(path for key in keys if (path := adapter_path(key)) is not None):
        node = tree.find(path)
        if node is not None:
            by_weight.setdefault(tree.first_of.get((node, "weight"), (node, "weight")), []).append(path)
    return frozenset(path for paths in by_weight.values() if len(paths) > 1 for path in paths)


def _misfit(what: str, missing: list[str], unexpected: list[str], count: int) -> Error:
    lines = [f"- {key}   missing" for key in missing[:_SHOWN]]
    lines += [f"+ {key}   reaches nothing" for key in unexpected[:_SHOWN]]
    more = max(0, len(missing) - _SHOWN) + max(0, len(unexpected) - _SHOWN)
    return Error(
        Diagnostic(
            "GP623",
            f"{what} does not fit this model: of what it needs {len(missing)} tensors are missing, and "
            f"{len(unexpected)} of {count} reach no module",
            text=(*lines, *([f"and {more} more"] if more else [])),
            fixes=("load the model that it was made for; its config says base_model_name_or_path",),
        )
    )


def _trained(plan: Plan) -> set[str]:
    """The parameters of the base that the rules train, each by its first name."""
    if plan.grads is None:
        return set()
    tree = plan.tree
    return {
        f"{path}.{name}".removeprefix(".")
        for node, path in enumerate(tree.paths)
        for name in tree.signature(node).parameters
        if (node, name) not in tree.first_of and plan.grads.of((node, name), new=False) == TRAIN
    }


def _first_name(tree: Tree, name: str) -> str:
    """That of a tied parameter's first place."""
    place = tree.find_parameter(name)
    return name if place is None else tree.parameter_paths(tree.first_of.get(place, place))[0]


def _split(name: str) -> tuple[str, str]:
    path, _, last = name.rpartition(".")
    return path, last


def _shape(tensor: torch.Tensor) -> list[int]:
    return list(tensor.shape)


def _is_start(added: str) -> bool:
    return added.endswith("_init")
