"""LoRA on `nn.Embedding`: the row of a token gains s B times the column that A has for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, embedding, linear

from .lora_base import Adapter, LoraModule
from .merging import LowRank, Merging


class LoraEmbedding(LoraModule):
    """A linear on one-hot inputs, without making any: A is looked up, B multiplied."""

    weight: Tensor
    padding_idx: int | None
    scale_grad_by_freq: bool

    @classmethod
    def initialise(cls, entry: Adapter, tensors: Mapping[str, Tensor], module: nn.Module) -> None:
        """A zero and B standard normal, as PEFT has it. The padding's column of A has no gradient and so stays zero,
        and the padding's row what it was, which it would not with A random."""
        with torch.no_grad():
            tensors[entry.a].zero_()
            tensors[entry.b].normal_()

    @classmethod
    def merging(
        cls, entry: Adapter, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
    ) -> Mapping[str, Merging]:
        """E + s (B A)^T."""
        return {"weight": LowRank.of(tensors[entry.a].t(), tensors[entry.b].t(), entry.scale)}

    def _update(self, adapter: Adapter, input: Tensor) -> Tensor:
        dtype = self.weight.dtype
        a, b = getattr(self, adapter.a), getattr(self, adapter.b)
        h = embedding(input, a.t(), self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq).to(dtype)
        if adapter.dropout and self.training:
            # The input is one number that is not zero, so that is dropped or kept: a token's whole update.
            h = h * dropout(h.new_ones(h.shape[:-1]), adapter.dropout).unsqueeze(-1)
        delta = linear(h if adapter.scale == 1.0 else h * adapter.scale, b.to(dtype)).to(dtype)
        # What scales its rows on the way out (Gemma's, Bart's) scales the sum of both.
        outer: Any = getattr(self, "embed_scale", None)
        return delta if outer is None else delta * (outer.to(dtype) if isinstance(outer, Tensor) else outer)
