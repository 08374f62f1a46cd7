"""Which parameters merging a patch would change, and by what; whatever stands against it is said here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, bfloat16, float16, float32, float64, nn

from ..lang.diagnostics import ApplyError, Diagnostic
from ..rewrites.merging import Merging, Unmergeable, in_order
from ..rewrites.quantised import is_writable
from .change import Change, WeightChange
from .coded import is_coded
from .fast_path import FastPathChange
from .in_place import InPlaceChange
from .record import Journal, Place, journals_of, roots


@dataclass(eq=False)
class Weight:
    """A parameter that merging changes."""

    place: Place
    path: str
    mergings: list[Merging] = field(default_factory=list)

    @property
    def key(self) -> tuple[int, str]:
        return id(self.place[0]), self.place[1]

    @property
    def tensor(self) -> Tensor:
        """The live parameter, detached: in-place changes count for it."""
        return self.place[0]._parameters[self.place[1]].detach()  # type: ignore[union-attr]


def weights_of(root: nn.Module, journal: Journal) -> list[Weight]:
    """The parameters that merging the patch changes, each once. Raises `ApplyError` (GP531) where it cannot be."""
    found: dict[tuple[int, str], Weight] = {}
    inside = set(root.modules())
    for change in journal.changes:
        if isinstance(change, (FastPathChange, WeightChange)) or not change.modules:
            continue  # a hook that does nothing; weights kept as codes, or that a loaded adapter brought
        if not isinstance(change, InPlaceChange):
            raise _cannot(journal.path(change.nodes[0]), change, "it is no change of a weight", _APART)
        for node, module in zip(change.nodes, change.modules):
            path = journal.path(node)
            if module not in inside:
                why = "another module is in its place by now, as `resize_token_embeddings` sees to"
                raise _cannot(path, change, why, "resize first, then apply the rules")
            for name, merging in _mergings(change, module, path).items():
                owner, leaf = _owner(module, name)
                weight = found.setdefault((id(owner), leaf), Weight((owner, leaf), f"{path}.{name}".removeprefix(".")))
                weight.mergings.append(merging)
    for weight in found.values():
        _refuse_unfit(weight)
        try:
            weight.mergings = in_order(weight.mergings)
        except Unmergeable as error:
            raise _unfit(weight, str(error), *error.fixes) from None
    _refuse_measured(root, journal, found.values())
    together = {id(m) for c in journal.changes if isinstance(c, InPlaceChange) and c.shared for m in c.modules}
    _refuse_shared(root, found.values(), together)
    return list(found.values())


def _refuse_measured(root: nn.Module, journal: Journal, weights: Iterable[Weight]) -> None:
    """An adapter of another patch that goes by the weight as it is: it would compute something else afterwards."""
    changed = {id(weight.place[0]): weight for weight in weights}
    for other in (j for top in roots(root) for j in journals_of(top) if j is not journal):
        for change in other.changes:
            if isinstance(change, InPlaceChange) and change.mixin.measures(change.entry) and not change.merged:
                for module in change.modules if change.weighted is not None else ():
                    if id(module) in changed:
                        raise _unfit(
                            changed[id(module)],
                            f"{change.mark.op} of another patch stands beside it, and goes by what the weight is now",
                            "merge that patch first, or deactivate its adapter",
                        )


_APART = "keep what is merged in a rule file of its own, and apply that as a patch by itself"


def _mergings(change: InPlaceChange, module: nn.Module, path: str) -> Mapping[str, Merging]:
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    own = {**module._parameters, **module._buffers}
    tensors = {name: own[name].detach() for name in change.added}  # type: ignore[union-attr]
    if change.shared:
        return {}  # the weight is another module's first, and changes there
    entry = change.weighted
    if entry is None:
        raise _cannot(path, change, "the adapter is not active", "activate it first")
    try:
        return change.mixin.merging_into(module, entry, tensors, shapes)
    except Unmergeable as error:
        raise _cannot(path, change, str(error), *(error.fixes or (_APART,))) from None


def _cannot(path: str, change: Change, why: str, *fixes: str) -> ApplyError:
    title = f"{change.mark.op} on `{path or '^'}` cannot be merged: {why}"
    return ApplyError(Diagnostic("GP531", title, text=(change.mark.rule,), fixes=fixes))


def _owner(module: nn.Module, name: str) -> Place:
    """The module that holds a parameter, for a name that may lead through children."""
    above, _, leaf = name.rpartition(".")
    return (module.get_submodule(above) if above else module), leaf


def _refuse_unfit(weight: Weight) -> None:
    module, name = weight.place
    tensor: Any = module._parameters.get(name)
    hook = module.__dict__.get("_hf_hook")
    if tensor is None:
        how = "a parametrization computes it" if name in getattr(module, "parametrizations", ()) else "there is none"
        raise _unfit(weight, f"it is no parameter of its module ({how})", "remove the parametrization first")
    if tensor.is_meta and any(getattr(h, "offload", False) for h in getattr(hook, "hooks", (hook,))):
        raise _unfit(weight, "accelerate keeps it off the model", _ON_DISK)
    if tensor.is_meta:
        raise _unfit(weight, "it is on the meta device, and has no values", "load the weights first", _ON_DISK)
    if hasattr(tensor, "full_tensor"):
        raise _unfit(weight, "it is sharded, and this rank has a part of it alone", "merge before sharding", _ON_DISK)
    if is_coded(weight.place) and is_writable(tensor):
        return
    if tensor.is_complex():
        raise _unfit(weight, "it is complex, and only floats are merged", "leave the adapter beside the weight")
    if tensor.dtype not in _FLOATS or type(tensor) not in (nn.Parameter, Tensor):
        holds = f"{type(tensor).__name__} of {str(tensor.dtype).removeprefix('torch.')}"
        raise _unfit(weight, f"it is quantised ({holds})", "merge into the base as it was before: " + _ON_DISK)


_FLOATS = (float64, float32, bfloat16, float16)
_ON_DISK = "graphpatch.save_adapter(patch, DIR), and on the files: graphpatch merge BASE DIR OUT"


def _refuse_shared(root: nn.Module, weights: Iterable[Weight], together: Set[int]) -> None:
    """A parameter that another module holds too, tied since the patch was applied, and not patched `together`."""
    held: dict[tuple[str, int], list[tuple[nn.Module, str, str]]] = {}
    for path, module in root.named_modules():
        for name, parameter in module._parameters.items():
            if type(parameter) in (nn.Parameter, Tensor) and not parameter.is_meta:  # type: ignore[union-attr]
                key = (str(parameter.device), parameter.data_ptr())  # type: ignore[union-attr]
                held.setdefault(key, []).append((module, name, f"{path}.{name}".removeprefix(".")))
    for weight in weights:
        tensor = weight.tensor
        holders = held.get((str(tensor.device), tensor.data_ptr()), []) if tensor.numel() else []
        others = [path for *place, path in holders if tuple(place) != weight.place and id(place[0]) not in together]
        if others:
            raise _unfit(
                weight,
                f"it is `{others[0]}` too, which would change with it",
                "give it a weight of its own: module.weight = nn.Parameter(module.weight.detach().clone())",
            )


def _unfit(weight: Weight, why: str, *fixes: str) -> ApplyError:
    return ApplyError(Diagnostic("GP531", f"nothing can be merged into `{weight.path}`: {why}", fixes=fixes))
