"""An adapter's weights for a patch of other rules: under its names and, where asked for, at its rank and scale.

A patch of a large enough rank is a slot: any smaller adapter on the same modules, or on fewer, runs in it exactly,
since zeros fill up the rank and B takes the ratio of the scales.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.nn.functional import pad

from ..lang.diagnostics import Diagnostic, Error
from ..ops.lora import Lora
from ..patch.original import original_plan, unmarked
from ..patch.patch import Patch
from ..plan.plan import Plan, Step
from ..tree.tree import Tree
from .peft.keys import added_name
from .saved import Saved
from .tensors import Named

Shape = tuple[int, ...]
_START = ("lora_A_init", "lora_B_init")


class _Place(NamedTuple):
    """One op on one target."""

    path: str
    op: Lora
    step: Step

    @property
    def names(self) -> dict[str, str]:
        """From what the op adds, `lora_A` or `in_proj_lora_A`, whatever its name, to the name of that tensor here."""
        return {added_name(name, self.op, self.step.parameter): name for name in self.step.adds}

    def key(self, role: str) -> str:
        return f"{self.path}.{self.names[role]}".removeprefix(".")

    def shape(self, role: str) -> Shape:
        return tuple(self.step.adds[self.names[role]].shape)


_Target = tuple[int, str | None]


def for_patch(saved: Saved, patch: Patch, fit: bool) -> Named:
    """The tensors of `saved`, for a patch of other rules. Raises `Error` (GP529)."""
    clean = unmarked(Tree.of(patch.model))
    theirs = _places(saved.plan(clean, saved.manifest.adapter, ()))
    mine = _places(original_plan(patch))
    if not fit:
        for target in theirs.keys() & mine.keys():
            _refuse_other_parts(saved.folder, theirs[target], mine[target])
            _refuse_other_scale(saved.folder, theirs[target], mine[target])
        return saved.tensors
    more = [theirs[target].path for target in theirs if target not in mine]
    if more:
        raise _no_fit(saved.folder, f"`{more[0]}` has no place for it, nor have {len(more) - 1} more of its modules")
    used = {place.key(role) for place in theirs.values() for role in place.names}
    found = {key: tensor for key, tensor in saved.tensors.items() if key not in used}
    for target, place in mine.items():
        found |= dict(_fitted(saved, theirs.get(target), place))
    return found


def _places(plan: Plan) -> dict[_Target, _Place]:
    return {
        (node, step.parameter): _Place(plan.tree.paths[node], step.op, step)
        for step in plan.steps
        if isinstance(step.op, Lora)
        for node in step.nodes
    }


def _refuse_other_parts(folder: str, theirs: _Place, mine: _Place) -> None:
    """Whose tensors may well have the same shapes."""
    one, two = ((place.op.parts, place.op.layout, place.op.groups) for place in (theirs, mine))
    if one != two:
        raise _no_fit(folder, f"on `{mine.path}` it has {theirs.op.text()}, and the patch {mine.op.text()}")


def _refuse_other_scale(folder: str, theirs: _Place, mine: _Place) -> None:
    if theirs.op.scale != mine.op.scale:
        raise Error(
            Diagnostic(
                "GP529",
                f"{folder} was trained at another scale than the patch has",
                text=(f"on `{theirs.path}`: {theirs.op.text()} there, {mine.op.text()} here",),
                fixes=("load_weights(patch, dir, fit=True) has B take the ratio",),
            )
        )


def _fitted(saved: Saved, theirs: _Place | None, mine: _Place) -> Iterator[tuple[str, torch.Tensor]]:
    """By key, all that the patch has on one target."""
    names = mine.names if theirs is None else theirs.names
    more = [role for role in names if not role.endswith(("lora_A", "lora_B"))]
    if names.keys() != mine.names.keys() or _START[0] in names or (theirs is None and more):
        text = "nothing" if theirs is None else theirs.op.text()
        raise _no_fit(saved.folder, f"on `{mine.path}` it has {text}, and the patch {mine.op.text()}")
    shapes = {role: mine.shape(role) for role in mine.names}
    if theirs is None:
        yield from ((mine.key(role), torch.zeros(shape)) for role, shape in shapes.items())
        return
    _refuse_other_parts(saved.folder, theirs, mine)
    if mine.op.scale == 0:
        raise _no_fit(saved.folder, f"on `{mine.path}` the patch has the scale 0: {mine.op.text()}")
    if theirs.op.rank > mine.op.rank:
        raise _no_fit(saved.folder, f"on `{mine.path}` it has the rank {theirs.op.rank}, and the patch {mine.op.rank}")
    ratio = theirs.op.scale / mine.op.scale
    for role, shape in shapes.items():
        value = saved.tensors[theirs.key(role)].float()
        scaled = role.endswith(("lora_B", "lora_B_bias"))
        share = theirs.shape(f"{role.rpartition('lora_')[0]}lora_B")[1]
        yield mine.key(role), _padded(value * ratio if scaled else value, theirs.shape(role), shape, share)


def _padded(value: torch.Tensor, before: Shape, after: Shape, share: int) -> torch.Tensor:
    """Zeros up to the other rank, at the axis in which the shapes differ. Of a grouped convolution the rows of A are
    each group's `share` of the rank, one after the other. What the file has in no such shape is left to be refused."""
    axes = [at for at, (one, two) in enumerate(zip(before, after)) if one != two]
    if tuple(value.shape) != before or len(axes) != 1:
        return value
    (at,) = axes
    groups = before[0] // share if at == 0 else 1
    apart = value.unflatten(at, (groups, -1))
    room = (0, 0) * (apart.dim() - at - 2) + (0, (after[at] - before[at]) // groups)
    return pad(apart, room).flatten(at, at + 1)


def _no_fit(folder: str, why: str) -> Error:
    return Error(
        Diagnostic(
            "GP529",
            f"{folder} does not fit into this patch",
            text=(why,),
            fixes=("a patch takes adapters of its kind on its modules, up to its rank: load_adapter adds any other",),
        )
    )
