"""LoRA on `nn.Linear` and what derives from it."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torch.nn.functional import dropout, linear

from .lora_base import Adapter
from .lora_options import LoraOfWeight
from .low_rank import LinearWithLowRank, add_low_rank, fusible, low_rank
from .rewrite import InPlace


class LoraLinear(LoraOfWeight):
    """y + s B A x, after whatever the class below computes."""

    weight: Tensor
    bias: Tensor | None

    @classmethod
    def variant(cls, below: type) -> type[InPlace]:
        # A subclass with a forward of its own (a quantised linear, a parallel one) must be asked.
        return LoraPlainLinear if getattr(below, "forward", None) is nn.Linear.forward else cls

    @staticmethod
    def matrix(module: nn.Module) -> Tensor:
        return module.weight  # type: ignore[return-value]

    def _add_all(self, output: Tensor, input: Tensor) -> Tensor:
        base = output
        for adapter in self._lora:
            if adapter.plain:
                z = dropout(input, adapter.dropout) if adapter.dropout and self.training else input
                output = add_low_rank(output, z, getattr(self, adapter.a), getattr(self, adapter.b), adapter.scale)
            else:
                output = output + self._addend(adapter, input, base).to(output.dtype)
        return output

    def _low_rank(self, z: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        return low_rank(z, a, b, scale)

    def _product(self, z: Tensor) -> Tensor:
        return linear(z, self.matrix(self))

    def _fused(self, adapter: Adapter, input: Tensor, weight: Tensor) -> Tensor:
        """The base, (out, in), and one adapter, with its options, around one node of the graph."""
        bias = self.bias
        if adapter.dropout and self.training:
            return self._add_all(linear(input, weight, bias), input)
        a, b = adapter.factors(partial(getattr, self))
        if adapter.bias:
            own = self._scaled_bias(adapter, weight)
            bias = own if bias is None else bias + own
        output: Tensor = LinearWithLowRank.apply(input, None, weight, bias, a, b, adapter.scale)  # type: ignore[no-untyped-call]
        if adapter.magnitude:
            return output + self._gain_less_one(adapter, output) * (output if bias is None else output - bias)
        return output


class LoraPlainLinear(LoraLinear):
    """The same where the class below is `nn.Linear` itself: its product is written out, and fused in training."""

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        weight, adapters = self.weight, self._lora
        if len(adapters) == 1 and fusible(input, weight):
            adapter = adapters[0]
            if not adapter.plain:
                return self._fused(adapter, input, weight)
            z = dropout(input, adapter.dropout) if adapter.dropout and self.training else None
            a, b = getattr(self, adapter.a), getattr(self, adapter.b)
            return LinearWithLowRank.apply(input, z, weight, self.bias, a, b, adapter.scale)  # type: ignore[no-any-return,no-untyped-call]
        return self._add_all(linear(input, weight, self.bias), input)
