"""Adapters that differ from sample to sample of one batch, for as long as `adapters(model).per_sample(...)` lasts."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.conv import _ConvNd

from ..lang.diagnostics import ApplyError, Diagnostic
from .lora_base import LoraModule
from .rewrite import InPlace


class Rows(NamedTuple):
    """Which adapters of a module compute for which samples."""

    samples: int
    """In a batch."""
    chosen: tuple[tuple[Any, tuple[int, ...]], ...]
    """Adapters' entries, each with the samples that have it."""
    path: str
    """Of the module."""


class ByRow(InPlace):
    """Stands before a module's own adapters, which see no entries meanwhile, and adds for each its rows' updates.

    The rows of one sample lie beside each other: a batch of k rows for each sample has them from k i to k (i + 1).
    """

    level: ClassVar[int] = LoraModule.level + 1
    entries: ClassVar[str] = "_by_row"
    _by_row: tuple[Rows, ...] = ()

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = super().forward(input, *args, **kwargs)
        for rows in self._by_row:
            output = self._add_to_rows(output, input, rows)
        return output

    def _add_to_rows(self, output: Tensor, input: Tensor, rows: Rows) -> Tensor:
        batched = output.dim() > 1 and (not isinstance(self, _ConvNd) or input.dim() == self.weight.dim())
        batch = input.shape[0] if batched else 1
        if batch % rows.samples or output.shape[:1] != input.shape[:1]:
            raise _odd_batch(rows, batch)
        beams, base = batch // rows.samples, output
        for at, (entry, samples) in enumerate(rows.chosen):
            index = torch.tensor(
                [i * beams + j for i in samples for j in range(beams)], dtype=torch.long, device=input.device
            )
            update = self._addend(entry, input.index_select(0, index), base.index_select(0, index))  # type: ignore[operator]
            update = update.to(output.dtype)
            # The base's output may be somebody else's too; the copy that the first makes is ours.
            output = output.index_add_(0, index, update) if at else output.index_add(0, index, update)
        return output


def _odd_batch(rows: Rows, batch: int) -> ApplyError:
    return ApplyError(
        Diagnostic(
            "GP548",
            f"`{rows.path or '^'}` was called with {batch} rows, and adapters were chosen for {rows.samples} samples",
            text=("each sample has the same number of rows there, those of one beside each other",),
            fixes=("give per_sample one entry for each sample of this batch",),
        )
    )
