"""DoRA: each row of W + s B A keeps its direction and has a trained length. Liu et al., arXiv:2402.09353, section 4."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .merging import LowRank, Merging


@torch.no_grad()
def row_norms(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """The lengths of the rows of W + s B A, for W of (..., out, in), A of (..., rank, in), B of (..., out, rank).

    The sum is never made: |w + s b A|^2 = |w|^2 + 2 s (w A^T) b^T + s^2 b (A A^T) b^T, row by row. A constant to
    backward, as section 4.3 of the paper has it. In float32 for a weight of half precision; exactly the weight's own
    where B is zero.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    squares = torch.linalg.vector_norm(weight, dim=-1, dtype=dtype).square()
    crossed = (weight @ a.to(weight.dtype).mT).to(dtype)
    a, b = a.to(dtype), scale * b.to(dtype)
    return (squares + ((2 * crossed + b @ (a @ a.mT)) * b).sum(-1)).clamp_min(0).sqrt()


def gain(magnitude: Tensor, norms: Tensor) -> Tensor:
    """What each row is multiplied by. A row of zeros has no direction; it stays zero, and no NaN."""
    return magnitude / norms.clamp_min(torch.finfo(norms.dtype).tiny)


class RowsToLengths(Merging):
    """DoRA merged into a weight whose rows it scales."""

    measures = True

    def __init__(self, gained: LowRank, magnitude: Tensor, norms: Tensor | None = None):
        """`norms` are the lengths of the rows of W + s B A, where these are parts of longer ones."""
        self.gained, self.magnitude, self.columns, self.norms = gained, magnitude, gained.columns, norms

    @property
    def cuts(self) -> Sequence[int]:
        return self.gained.cuts

    def rows(self, rows: Tensor, start: int) -> Tensor:
        rows = self.gained.rows(rows, start)
        here = slice(start, start + len(rows))
        norms = torch.linalg.vector_norm(rows, dim=1) if self.norms is None else self.norms[here].to(rows.dtype)
        return rows.mul_(gain(self.magnitude[here].to(rows.dtype), norms)[:, None])

    def limit(self, largest: float) -> float:
        return _longest(self, largest)


class ColumnsToLengths(Merging):
    """The same for a weight that is stored (in, out): a column's length is known when all rows were seen."""

    looks = measures = True

    def __init__(self, gained: LowRank, magnitude: Tensor):
        self.gained, self.magnitude, self.columns = gained, magnitude, gained.columns
        self._squares: Tensor | float = 0.0

    @property
    def cuts(self) -> Sequence[int]:
        return self.gained.cuts

    def look(self, rows: Tensor, start: int) -> None:
        before = self._squares if start else 0.0
        self._squares = before + self.gained.rows(rows, start).square().sum(0)

    def rows(self, rows: Tensor, start: int) -> Tensor:
        norms = torch.as_tensor(self._squares).sqrt()
        return self.gained.rows(rows, start).mul_(gain(self.magnitude.to(rows.dtype), norms.to(rows.dtype)))

    def limit(self, largest: float) -> float:
        return _longest(self, largest)


def _longest(merging: RowsToLengths | ColumnsToLengths, largest: float) -> float:
    """No element is larger than what it is part of is long (the sums are rounded)."""
    gained = merging.gained.limit(largest)
    return 1.01 * float(merging.magnitude.abs().max()) if math.isfinite(gained) else gained
