"""What LoRA is on a module of any kind; how its update is computed stands in a file for each kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..ops.lora import Lora
from ..ops.op import Op
from .merging import LowRank, Merging
from .rewrite import InPlace


class Adapter(NamedTuple):
    """One adapter on a module: the names of its factors there, and what to do with them."""

    a: str
    b: str
    scale: float
    dropout: float
    init: str
    text: str


class LoraModule(InPlace):
    """Adds every adapter's update to what the class below computes from the same input."""

    level: ClassVar[int] = Lora.level
    entries: ClassVar[str] = "_lora"
    _lora: tuple[Adapter, ...] = ()  # of an instance that somebody makes of the generated class: it is a base

    @classmethod
    def entry(cls, op: Op, parameter: str | None = None) -> Adapter:
        lora = cast(Lora, op)
        return Adapter(*lora.keys, lora.scale, lora.dropout, lora.init, lora.text())

    @classmethod
    def initialise(cls, entry: Adapter, tensors: Mapping[str, Tensor], module: nn.Module) -> None:
        """A as PEFT has it: kaiming uniform with a = sqrt(5), which is uniform in +-1/sqrt(fan-in); B zero."""
        a, b = tensors[entry.a], tensors[entry.b]
        with torch.no_grad():
            if entry.init == "gaussian":
                a.normal_(std=1 / a.shape[0])
            else:
                bound = (a.numel() / a.shape[0]) ** -0.5
                a.uniform_(-bound, bound)
            b.zero_()

    @classmethod
    def merging(
        cls, entry: Adapter, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
    ) -> Mapping[str, Merging]:
        """W + s B A, for a weight that is stored (out, in)."""
        return {"weight": LowRank.of(tensors[entry.b], tensors[entry.a], entry.scale)}

    def reset_parameters(self) -> None:
        """The base's own reset, and fresh factors: `to_empty` and `reset_parameters` leave no garbage behind."""
        reset = getattr(super(), "reset_parameters", None)
        if reset is not None:
            reset()
        for adapter in self._lora:
            self.initialise(adapter, {name: getattr(self, name) for name in (adapter.a, adapter.b)}, self)

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self._add_all(super().forward(input, *args, **kwargs), input)

    def _add_all(self, output: Tensor, input: Tensor) -> Tensor:
        """The output and every adapter's update."""
        for adapter in self._lora:
            output = output + self._update(adapter, input).to(output.dtype)
        return output

    def _update(self, adapter: Adapter, input: Tensor) -> Tensor:
        """What one adapter adds to the output for this input: s B A z, with z the input after dropout."""
        raise NotImplementedError
