"""LoRA on the `VocabParallelEmbedding` of megatron-core."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from ..rewrites.lora_base import Adapter
from ..rewrites.lora_embedding import LoraEmbedding
from .factors import Sharded
from .lora import refuse_shared
from .sharding import Marks, drawn_alike, dropping_apart, group_of, replicated_marks, sharded_marks


class LoraVocabParallelEmbedding(Sharded, LoraEmbedding):
    """A has the columns of this rank's tokens; what it has for a token, zero on all ranks but one, is summed before B,
    which is whole: the sum is rank-wide."""

    by_row: ClassVar[bool] = False
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
        with drawn_alike(module):
            super()._start(entry, a, b, module)

    def _low_rank(self, z: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        from megatron.core.tensor_parallel.mappings import (
            reduce_from_tensor_model_parallel_region,
            reduce_scatter_to_sequence_parallel_region,
        )

        here = (z >= self.vocab_start_index) & (z < self.vocab_end_index)
        rows = embedding(torch.where(here, z - self.vocab_start_index, 0), a.t())
        h = rows.to(self.weight.dtype) * here.unsqueeze(-1)
        if self.reduce_scatter_embeddings:
            # Sequence first, as the output is, of which this rank has a part.
            h = reduce_scatter_to_sequence_parallel_region(h.transpose(0, 1).contiguous(), group=group_of(self))
        else:
            h = reduce_from_tensor_model_parallel_region(h, group=group_of(self))
        return linear(h if scale == 1.0 else h * scale, b.to(h.dtype))

    def _dropping(self, adapter: Adapter, added: Tensor) -> Tensor:
        with dropping_apart(self, self.reduce_scatter_embeddings):
            return super()._dropping(adapter, added)
