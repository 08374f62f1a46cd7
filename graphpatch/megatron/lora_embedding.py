"""LoRA on the `VocabParallelEmbedding` of megatron-core."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, embedding, linear

from ..rewrites.lora_base import Adapter, LoraModule
from ..rewrites.lora_options import LoraOfWeight
from .factors import sharded_factors
from .lora import refuse_shared
from .sharding import Marks, drawn_alike, dropping_apart, group_of, replicated_marks, sharded_marks


class LoraVocabParallelEmbedding(LoraOfWeight):
    """A has the columns of this rank's tokens; what it has for a token, zero on all ranks but one, is summed before B,
    which is whole: the sum is rank-wide."""

    by_row: ClassVar[bool] = False
    transposed = True
    weight: Tensor
    reduce_scatter_embeddings: bool
    vocab_start_index: int
    vocab_end_index: int

    @classmethod
    def check(cls, entry: Adapter, module: nn.Module) -> None:
        refuse_shared(module)

    @classmethod
    def attributes(cls, entry: Adapter, module: nn.Module) -> Mapping[str, Marks]:
        part_of_sequence = bool(module.reduce_scatter_embeddings)
        return {entry.a: sharded_marks(module, 1), entry.b: replicated_marks(module, partial=part_of_sequence)}

    @classmethod
    def _start(cls, entry: Adapter, a: Tensor, b: Tensor, module: nn.Module) -> None:
        """As of every embedding: A zero and B standard normal."""
        a.zero_()
        with drawn_alike(module):
            b.copy_(torch.randn(b.shape, dtype=b.dtype))

    @staticmethod
    def matrix(module: nn.Module) -> Tensor:
        return module.weight.t()  # type: ignore[operator, no-any-return]

    def forward(self, input_: Tensor) -> Tensor:
        # Past the one of all mixins: what comes out may have its dimensions in another order.
        return self._add_all(super(LoraModule, self).forward(input_), input_)

    def _addend(self, adapter: Adapter, input: Tensor, output: Tensor) -> Tensor:
        from megatron.core.tensor_parallel.mappings import (
            reduce_from_tensor_model_parallel_region,
            reduce_scatter_to_sequence_parallel_region,
        )

        here = (input >= self.vocab_start_index) & (input < self.vocab_end_index)
        rows = embedding(torch.where(here, input - self.vocab_start_index, 0), getattr(self, adapter.a).t())
        h = rows.to(self.weight.dtype) * here.unsqueeze(-1)
        if self.reduce_scatter_embeddings:
            h = reduce_scatter_to_sequence_parallel_region(h.transpose(0, 1).contiguous(), group=group_of(self))
        else:
            h = reduce_from_tensor_model_parallel_region(h, group=group_of(self))
        added = linear(h if adapter.scale == 1.0 else h * adapter.scale, getattr(self, adapter.b).to(h.dtype))
        if not (adapter.dropout and self.training):
            return added
        # A token's whole update is dropped or kept, as of every embedding.
        with dropping_apart(self, self.reduce_scatter_embeddings):
            return added * dropout(added.new_ones(added.shape[:-1]), adapter.dropout).unsqueeze(-1)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        base = super().sharded_state_dict(prefix, sharded_offsets, metadata)  # type: ignore[misc]
        return {**base, **sharded_factors(self, prefix, sharded_offsets, metadata)}
