"""Of a checkpoint's tensors, what one rank needs: of a matrix whose rows it shares with others, its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...plan.maps import Piece
from .layouts import by_rows, changed
from .slots import Slot


class Source(NamedTuple):
    """A checkpoint, or a state dict: the shapes, and ways to a tensor and to a stretch of one."""

    name: str
    shapes: Mapping[str, tuple[int, ...]]
    read: Any
    """A tensor, by its name."""
    read_part: Any
    """Of a tensor, by its name, the stretch along a dimension (0 or 1) from a number to another."""


def read_for(piece: Piece, targets: Mapping[str, Slot], given: Source) -> list[Tensor]:
    """What `piece` makes of the checkpoint's tensors, as far as this rank has the targets: each already cut."""
    part = _part(piece, targets[piece.targets[0]], given) if len(piece.targets) == 1 else None
    if part is not None:
        return [part]
    made = changed(piece, [given.read(key) for key in piece.sources])
    return [targets[key].cut(value) for key, value in zip(piece.targets, made)]


def _part(piece: Piece, slot: Slot, given: Source) -> Tensor | None:
    """The part that the slot takes, by reading nothing else; None where that cannot be told beforehand.

    Which rows (or columns) those are is found by doing to numbers what is done to the tensors.
    """
    shapes = [given.shapes[key] for key in piece.sources]
    if slot.dim is None or any(len(shape) <= slot.dim for shape in shapes):
        return None
    numbers, start = [], 0
    for shape in shapes:
        numbers.append(torch.arange(start, start + shape[slot.dim]))
        start += shape[slot.dim]
    if piece.layout is None:
        wanted = slot.cut(numbers[0] if slot.dim == 0 else numbers[0][None]).flatten()
    elif slot.dim == 0 and by_rows(piece):
        wanted = slot.cut(changed(piece, numbers)[0])
    else:
        return None
    return torch.cat(
        [given.read_part(piece.sources[at], slot.dim, *run) for at, run in _runs(wanted, numbers)], slot.dim
    )


def _runs(wanted: Tensor, numbers: Sequence[Tensor]) -> Iterator[tuple[int, tuple[int, int]]]:
    """Stretches of numbers that follow each other, each with the place of the tensor that they are of."""
    firsts = torch.tensor([int(own[0]) for own in numbers])
    owner = torch.bucketize(wanted, firsts, right=True) - 1
    breaks = ((wanted.diff() != 1) | (owner.diff() != 0)).nonzero().flatten() + 1
    for stretch in torch.tensor_split(wanted, breaks):
        at = int(torch.bucketize(stretch[0], firsts, right=True)) - 1
        first = int(stretch[0]) - int(firsts[at])
        yield at, (first, first + len(stretch))
