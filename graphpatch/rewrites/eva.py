"""EVA: A starts from the principal directions of the inputs it will see. Paischer et al., arXiv:2410.07170."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_ROWS = 512
"""So many rows are taken in at once: what bounds the memory, with the number of directions kept."""
_ALIKE = 0.99
"""The cosine from which on a direction has settled; PEFT's tau."""


class Seen(NamedTuple):
    """What is left of the rows seen so far."""

    number: int
    mean: Tensor
    values: Tensor
    """Singular values of the centred rows, the largest first."""
    directions: Tensor
    """The singular vectors, a row each."""
    settled: bool


@dataclass(frozen=True)
class Directions:
    """Looks at the inputs of one module: an incremental principal component analysis (Ross et al., Incremental learning
    for robust visual tracking, 2008, section 3.2), which keeps twice as many directions as are asked for."""

    rank: int

    def see(self, state: Seen | None, rows: Tensor) -> Seen | None:
        """The state after `rows` (n, in) too; None until there were any."""
        before = state
        for some in rows.split(_ROWS):
            if len(some):
                state = self._with(state, some)
        if before is not None and state is not None and len(rows):
            cosines = (before.directions[: self.rank] * state.directions[: self.rank]).sum(-1).abs()
            state = state._replace(settled=len(before.directions) >= self.rank and bool((cosines >= _ALIKE).all()))
        return state

    def _with(self, state: Seen | None, rows: Tensor) -> Seen:
        if state is not None and not state.mean.isfinite().all():
            return state
        # The squares of the Gram matrix below want twice the digits, where the device has them.
        rows = rows.to(torch.float32 if rows.device.type == "mps" else torch.float64)
        mean = rows.mean(0)
        if not rows.isfinite().all():
            return Seen(len(rows), mean, mean[:0], rows[:0], False)
        stacked, count = rows - mean, len(rows)
        if state is not None:
            shift = (state.number * count / (state.number + count)) ** 0.5 * (state.mean - mean)
            stacked = torch.cat([state.values[:, None] * state.directions, stacked, shift[None]])
            mean = (state.number * state.mean + count * mean) / (state.number + count)
            count += state.number
        squares, vectors = torch.linalg.eigh(stacked @ stacked.mT)
        kept = int((squares > squares[-1] * 1e-12).sum().clamp(max=2 * self.rank))
        values = squares[-kept:].flip(0).sqrt() if kept else squares[:0]
        directions = vectors[:, -kept:].flip(1).mT @ stacked / values[:, None] if kept else stacked[:0]
        return Seen(count, mean, values, directions, False)

    def settled(self, state: Seen | None) -> bool:
        """Whether more rows would tell nothing new."""
        return state is not None and state.settled

    def lacks(self, state: Seen | None) -> str:
        """Why what was seen is not enough; empty where it is."""
        if state is None:
            return "no input reached it"
        if not state.mean.isfinite().all():
            return "its inputs are not finite"
        if len(state.directions) < self.rank:
            return f"its {state.number} inputs have {len(state.directions)} directions, and the rank is {self.rank}"
        return ""
