"""LoRA on `nn.Linear`, what derives from it, and the linears of quantisation libraries."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear

from ..ops.lora import Lora
from ..ops.op import Op
from .lora_base import Adapter, LoraModule
from .lora_options import LoraOfWeight
from .low_rank import LinearWithLowRank, add_low_rank, fusible, low_rank
from .merging import Merging, Unmergeable
from .own_forward import is_product, refuse_misfit
from .quantised import dequantised
from .rewrite import InPlace


class LoraLinear(LoraOfWeight):
    """y + s B A x, after whatever the class below computes."""

    weight: Tensor
    bias: Tensor | None

    @classmethod
    def variant(cls, below: type) -> type[InPlace]:
        # A subclass with a forward of its own (a quantised linear, a parallel one) must be asked.
        return LoraPlainLinear if getattr(below, "forward", None) is nn.Linear.forward else cls

    @classmethod
    def entry(cls, op: Op, parameter: str | None = None) -> Adapter:
        entry = super().entry(op, parameter)
        return entry._replace(swapped=True, plain=False) if cast(Lora, op).tied else entry

    @classmethod
    def _start(cls, entry: Adapter, a: Tensor, b: Tensor, module: nn.Module) -> None:
        if entry.swapped:
            a.zero_(), b.normal_()  # as an embedding's
        else:
            super()._start(entry, a, b, module)

    @staticmethod
    def matrix(module: nn.Module) -> Tensor:
        return dequantised(module)

    @classmethod
    def merging_into(
        cls, module: nn.Module, entry: Adapter, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
    ) -> Mapping[str, Merging]:
        if not is_product(module, cls.matrix):
            raise Unmergeable(
                f"the forward of {type(module).__name__} makes more of its weight than W x + b, "
                "and what stands beside that would be another model in the weight",
                "leave the adapter beside the weight: save_adapter and load_adapter keep it there",
            )
        return super().merging_into(module, entry, tensors, shapes)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        output = super(LoraModule, self).forward(*args, **kwargs)
        if not self._lora:
            return output  # type: ignore[no-any-return]
        # The input's name is the class's own.
        input = args[0] if args else next(iter(kwargs.values()))
        refuse_misfit(self, input, output)
        return self._add_all(output, input)

    def _add_all(self, output: Tensor, input: Tensor) -> Tensor:
        base = output
        for adapter in self._lora:
            if adapter.plain:
                z = dropout(input, adapter.dropout) if adapter.dropout and self.training else input
                output = add_low_rank(output, z, self._own(adapter.a), self._own(adapter.b), adapter.scale)
            else:
                output = output + self._addend(adapter, input, base).to(output.dtype)
        return output

    def _own(self, name: str) -> Any:
        """A parameter, past `nn.Module.__getattr__`, which takes as long as a quarter of a small product."""
        own = self._parameters
        return own[name] if name in own else getattr(self, name)

    def _low_rank(self, z: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        return low_rank(z, a, b, scale)

    def _product(self, z: Tensor) -> Tensor:
        return linear(z, self.matrix(self))

    def _fused(self, adapter: Adapter, input: Tensor, weight: Tensor) -> Tensor:
        """The base, (out, in), and one adapter, with its options, around one node of the graph."""
        bias = self.bias
        dropping = adapter.dropout and self.training
        if dropping and (adapter.bias or adapter.magnitude or adapter.started):
            return self._add_all(linear(input, weight, bias), input)
        z = dropout(input, adapter.dropout) if dropping else None
        a, b = adapter.factors(partial(getattr, self))
        if adapter.bias:
            own = self._scaled_bias(adapter, weight)
            bias = own if bias is None else bias + own
        output: Tensor = LinearWithLowRank.apply(input, z, weight, bias, a, b, adapter.scale)  # type: ignore[no-untyped-call]
        if adapter.magnitude:
            return output + self._gain_less_one(adapter, output) * (output if bias is None else output - bias)
        return output


class LoraPlainLinear(LoraLinear):
    """The same where the class below is `nn.Linear` itself: its product is written out, and fused in training."""

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        if torch.compiler.is_compiling():
            return self._add_all(linear(input, self.weight, self.bias), input)
        weight, bias, adapters = self._own("weight"), self._own("bias"), self._lora
        if len(adapters) != 1 or not fusible(input, weight):
            return self._add_all(linear(input, weight, bias), input)
        adapter = adapters[0]
        if not adapter.plain:
            return self._fused(adapter, input, weight)
        z = dropout(input, adapter.dropout) if adapter.dropout and self.training else None
        a, b = self._own(adapter.a), self._own(adapter.b)
        return LinearWithLowRank.apply(input, z, weight, bias, a, b, adapter.scale)  # type: ignore[no-any-return,no-untyped-call]
