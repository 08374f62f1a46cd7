"""LoRA on `nn.Linear` and what derives from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear

from ..ops.lora import Lora
from ..ops.op import Op
from .low_rank import LinearWithLowRank, add_low_rank, fusible
from .rewrite import InPlace


class Adapter(NamedTuple):
    """One adapter on a linear: the names of its factors there, and what to do with them."""

    a: str
    b: str
    scale: float
    dropout: float
    init: str
    text: str


class LoraLinear(InPlace):
    """Adds every adapter's update to what the class below computes from the same input."""

    level: ClassVar[int] = Lora.level
    entries: ClassVar[str] = "_lora"
    _lora: tuple[Adapter, ...]

    @classmethod
    def entry(cls, op: Op) -> Adapter:
        lora = cast(Lora, op)
        return Adapter(*lora.keys, lora.scale, lora.dropout, lora.init, lora.text())

    @classmethod
    def variant(cls, below: type) -> type[InPlace]:
        # A subclass with a forward of its own (a quantised linear, a parallel one) must be asked.
        return LoraPlainLinear if getattr(below, "forward", None) is nn.Linear.forward else cls

    @classmethod
    def initialise(cls, entry: Adapter, tensors: Mapping[str, Tensor]) -> None:
        """A as PEFT has it: kaiming uniform with a = sqrt(5), which is uniform in +-1/sqrt(in); B zero."""
        a, b = tensors[entry.a], tensors[entry.b]
        with torch.no_grad():
            if entry.init == "gaussian":
                a.normal_(std=1 / a.shape[0])
            else:
                bound = a.shape[1] ** -0.5
                a.uniform_(-bound, bound)
            b.zero_()

    def reset_parameters(self) -> None:
        """The base's own reset, and fresh factors: `to_empty` and `reset_parameters` leave no garbage behind."""
        super().reset_parameters()  # type: ignore[misc]
        for adapter in self._lora:
            self.initialise(adapter, {name: getattr(self, name) for name in (adapter.a, adapter.b)})

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self._add_all(super().forward(input, *args, **kwargs), input)

    def _add_all(self, output: Tensor, input: Tensor) -> Tensor:
        for adapter in self._lora:
            z = dropout(input, adapter.dropout) if adapter.dropout and self.training else input
            output = add_low_rank(output, z, getattr(self, adapter.a), getattr(self, adapter.b), adapter.scale)
        return output


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
