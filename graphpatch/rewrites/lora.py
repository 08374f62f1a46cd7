"""LoRA on `nn.Linear` and what derives from it."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import dropout, linear

from .lora_base import Adapter, LoraModule
from .low_rank import LinearWithLowRank, add_low_rank, fusible, low_rank
from .rewrite import InPlace


class LoraLinear(LoraModule):
    """y + s B A x, after whatever the class below computes."""

    @classmethod
    def variant(cls, below: type) -> type[InPlace]:
        # A subclass with a forward of its own (a quantised linear, a parallel one) must be asked.
        return LoraPlainLinear if getattr(below, "forward", None) is nn.Linear.forward else cls

    def _add_all(self, output: Tensor, input: Tensor) -> Tensor:
        for adapter in self._lora:
            z = dropout(input, adapter.dropout) if adapter.dropout and self.training else input
            output = add_low_rank(output, z, getattr(self, adapter.a), getattr(self, adapter.b), adapter.scale)
        return output

    def _update(self, adapter: Adapter, input: Tensor) -> Tensor:
        z = dropout(input, adapter.dropout) if adapter.dropout and self.training else input
        return low_rank(z, getattr(self, adapter.a), getattr(self, adapter.b), adapter.scale)


class LoraPlainLinear(LoraLinear):
    """The same where the class below is `nn.Linear` itself: its product is written out, and fused in training."""

    weight: Tensor
    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        weight, adapters = self.weight, self._lora
        if len(adapters) == 1 and fusible(input, weight):
            adapter = adapters[0]
            z = dropout(input, adapter.dropout) if adapter.dropout and self.training else None
            a, b = getattr(self, adapter.a), getattr(self, adapter.b)
            return LinearWithLowRank.apply(input, z, weight, self.bias, a, b, adapter.scale)  # type: ignore[no-any-return,no-untyped-call]
        return self._add_all(linear(input, weight, self.bias), input)
