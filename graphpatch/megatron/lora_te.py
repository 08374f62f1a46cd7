"""LoRA on the linears of Transformer Engine as megatron-core derives them, found by name.

Written against their documented interface, and tested on stand-ins of the same shapes and collectives, not on a GPU.
They multiply and reduce in one kernel, so an update joins what they put out, in the same state: a rank's rows of a
column-parallel linear, the whole (under sequence parallelism the rank's part of the sequence) of a row-parallel one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ..rewrites.lora_base import Adapter, LoraModule
from .lora import LoraColumnParallel, LoraParallel, LoraRowParallel, refuse_shared
from .sharding import Marks, group_of, replicated_marks, sharded_marks


class LoraOfEngine(LoraParallel):
    """What they share: output and bias come out together."""

    @classmethod
    def check(cls, entry: Adapter, module: nn.Module) -> None:
        refuse_shared(module)

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        output, bias = super(LoraModule, self).forward(input, *args, **kwargs)
        return (self._add_all(output, self._multiplied(input)) if self._lora else output), bias

    def _multiplied(self, input: Tensor) -> Tensor:
        """What the weight is multiplied with."""
        return input


class LoraTEColumn(LoraOfEngine, LoraColumnParallel):
    """y_r + s B_r A x, with the collectives of a `ColumnParallelLinear`'s."""


class LoraTELayerNormColumn(LoraTEColumn):
    """Of a linear with the norm before it fused to it: A sees what the norm puts out, worked out once more."""

    def _multiplied(self, input: Tensor) -> Tensor:
        own: Any = self
        weight = own.layer_norm_weight + 1 if own.zero_centered_gamma else own.layer_norm_weight
        if own.normalization == "RMSNorm":
            return F.rms_norm(input, weight.shape, weight, own.eps)
        return F.layer_norm(input, weight.shape, weight, own.layer_norm_bias, own.eps)


class LoraTERow(LoraOfEngine, LoraRowParallel):
    """y + s B (A x), with A x summed over the ranks, which is rank-wide."""

    @classmethod
    def attributes(cls, entry: Adapter, module: nn.Module) -> Mapping[str, Marks]:
        # B sees the rank's part of the sequence, or all of it on each.
        whole = replicated_marks(module, partial=bool(module.sequence_parallel))
        return {entry.a: sharded_marks(module, 1), entry.b: whole}

    def _low_rank(self, z: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        from megatron.core.tensor_parallel.mappings import (
            reduce_from_tensor_model_parallel_region,
            reduce_scatter_to_sequence_parallel_region,
        )

        summed = (
            reduce_scatter_to_sequence_parallel_region
            if self.sequence_parallel
            else reduce_from_tensor_model_parallel_region
        )
        h = summed(F.linear(z, a.to(z.dtype)), group=group_of(self))
        return F.linear(h if scale == 1.0 else h * scale, b.to(h.dtype))
