"""How tensors of one layout make those of another: what `using` names in a `map`.

Each layout is a pair of functions: tensors to tensors, and back. They are tried on the meta device first, where shapes
that do not fit are found before anything is read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...lang.diagnostics import Diagnostic, Error, did_you_mean
from ...plan.maps import Piece, bound

Change = Callable[[Sequence[Tensor], int], list[Tensor]]
"""From tensors, and the number that shall be made of them."""


class Layout(NamedTuple):
    onward: Change
    back: Change
    by_rows: bool = False
    """Whether onward only brings rows into another order."""


def concat(dim: int = 0, sizes: Sequence[int] | None = None) -> Layout:
    """Tensors one after another along `dim`; back, equal parts, or those of `sizes`."""

    def onward(tensors: Sequence[Tensor], _: int) -> list[Tensor]:
        return [torch.cat(list(tensors), dim)]

    def back(tensors: Sequence[Tensor], number: int) -> list[Tensor]:
        (whole,) = tensors
        if sizes is None and whole.shape[dim] % number:
            raise ValueError(f"{list(whole.shape)} has no {number} equal parts along {dim}: say sizes=[...]")
        return [part.contiguous() for part in whole.split(list(sizes) if sizes else whole.shape[dim] // number, dim)]

    return Layout(onward, back, by_rows=dim == 0)


def split(dim: int = 0, sizes: Sequence[int] | None = None) -> Layout:
    """The parts of one tensor: `concat`, the other way round."""
    there = concat(dim, sizes)
    return Layout(there.back, there.onward)


def stack(dim: int = 0) -> Layout:
    """Tensors of one shape along a new dimension, as the experts of a layer are kept."""
    return Layout(
        lambda tensors, _: [torch.stack(list(tensors), dim)],
        lambda tensors, _: [part.contiguous() for part in tensors[0].unbind(dim)],
    )


def transpose(dim0: int = 0, dim1: int = 1) -> Layout:
    """Each tensor with two dimensions exchanged."""

    def change(tensors: Sequence[Tensor], _: int) -> list[Tensor]:
        return [tensor.transpose(dim0, dim1).contiguous() for tensor in tensors]

    return Layout(change, change)


def pad(rows: int, of: int) -> Layout:
    """`of` rows, and rows of zeros up to `rows`, as vocabularies are that ranks share evenly; back, those `of` rows."""
    if not 0 < of <= rows:
        raise ValueError(f"{of} rows are not padded to {rows}")

    def onward(tensors: Sequence[Tensor], _: int) -> list[Tensor]:
        wrong = next((len(tensor) for tensor in tensors if len(tensor) != of), None)
        if wrong is not None:
            raise ValueError(f"there are {wrong} rows, and not the {of} that are to be padded")
        return [torch.cat([tensor, tensor.new_zeros(rows - of, *tensor.shape[1:])]) for tensor in tensors]

    return Layout(onward, lambda tensors, _: [tensor[:of].contiguous() for tensor in tensors])


def interleave(heads: int, groups: int) -> Layout:
    """Rows of q, k and v as megatron-core keeps them in one `linear_qkv`: for each of `groups` key-value groups the
    rows of its heads / groups query heads, then of its key, then of its value. Of biases too."""

    if groups < 1 or heads % groups:
        raise ValueError(f"{heads} heads are not shared evenly by {groups} groups")

    def onward(tensors: Sequence[Tensor], _: int) -> list[Tensor]:
        rows = [len(tensor) for tensor in tensors]
        if len(rows) == 3 and not rows[0] * groups == rows[1] * heads == rows[2] * heads:
            raise ValueError(f"{rows} rows are not those of {heads} query heads in {groups} groups")
        q, k, v = (tensor.reshape(groups, -1, *tensor.shape[1:]) for tensor in tensors)
        return [torch.cat([q, k, v], 1).reshape(-1, *tensors[0].shape[1:])]

    def back(tensors: Sequence[Tensor], _: int) -> list[Tensor]:
        (whole,) = tensors
        by_group = whole.reshape(groups, -1, *whole.shape[1:])
        head = by_group.shape[1] // (heads // groups + 2)
        parts = by_group.split([head * (heads // groups), head, head], 1)
        return [part.reshape(-1, *whole.shape[1:]) for part in parts]

    return Layout(onward, back, by_rows=True)


LAYOUTS: dict[str, Callable[..., Layout]] = {
    "concat": concat, "split": split, "stack": stack, "transpose": transpose, "qkv.interleave": interleave,
    "pad": pad,
}  # fmt: skip


def changed(piece: Piece, tensors: Sequence[Tensor], back: bool = False) -> list[Tensor]:
    """The tensors of `piece.targets` from those of `piece.sources`. Raises `Error` (GP660) where the layout does not
    exist, or they do not fit it."""
    if piece.layout is None:
        return list(tensors)
    layout = _layout(piece)
    try:
        made = (layout.back if back else layout.onward)(tensors, len(piece.targets))
        if len(made) != len(piece.targets):
            raise ValueError(f"it makes {len(made)} tensors, and {len(piece.targets)} are named")
    except (RuntimeError, ValueError, IndexError, TypeError, ZeroDivisionError) as error:
        shapes = ", ".join(f"{key} {list(tensor.shape)}" for key, tensor in zip(piece.sources, tensors))
        title = f"`{piece.layout.name}` does not fit what it is given"
        why = " ".join(str(error).split())[:200]
        raise Error(Diagnostic("GP660", title, text=(shapes, why))) from None
    return made


def by_rows(piece: Piece) -> bool:
    """Whether the piece's layout only brings rows into another order."""
    return _layout(piece).by_rows


def _layout(piece: Piece) -> Layout:
    call, scope = piece.layout, bound(piece)
    assert call is not None
    make = LAYOUTS.get(call.name)
    if make is None:
        near = did_you_mean(call.name, LAYOUTS) or f"there are {', '.join(LAYOUTS)}"
        raise Error(scope.finding("GP660", f"no layout is called `{call.name}`", call.name_span or call.span, near))
    positional: list[Any] = [scope.value(arg.value) for arg in call.args if arg.name is None]
    named = {arg.name: scope.value(arg.value) for arg in call.args if arg.name is not None}
    try:
        return make(*positional, **named)
    except (TypeError, ValueError) as error:
        said = str(error).partition("() ")[2] or str(error)
        raise Error(scope.finding("GP660", f"`{call.name}` {said}", call.span)) from None
