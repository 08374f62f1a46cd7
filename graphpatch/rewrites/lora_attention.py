"""LoRA on `nn.MultiheadAttention`, which takes weights and calls no linear: it gets weights that have gained s B A."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ..ops.lora import Lora
from ..ops.lora_attention import chosen_weights
from ..ops.lora_parts import Spread
from ..ops.op import Op
from .lora_base import Adapter, LoraModule
from .merging import LowRank, Merging
from .spread import spread


class Pair(NamedTuple):
    """The factors of one of the module's weights."""

    weight: str
    a: str
    b: str
    parts: tuple[int, ...] | None
    """Of q, k and v in one, those that gain something; None where that is the whole."""
    rank: int

    def spread(self, b: Tensor) -> Spread | None:
        if self.parts is None:
            return None
        return Spread(1, (len(b) // len(self.parts),) * 3, self.parts, self.rank)

    def factors(self, get: Callable[[str], Tensor]) -> tuple[Tensor, Tensor]:
        b = get(self.b)
        how = self.spread(b)
        return get(self.a), b if how is None else spread(b, how)


class LoraAttention(LoraModule):
    """The weights are put together in each call, as PEFT does, and given to the base's forward on a stand-in: the
    module itself does not change, so that threads may share it."""

    by_row = False
    separate: ClassVar[bool] = False
    """Whether q, k and v have a weight each."""

    @classmethod
    def entry(cls, op: Op, parameter: str | None = None) -> Adapter:
        lora = cast(Lora, op)
        pairs = tuple(
            Pair(weight, lora.key("lora_A", prefix), lora.key("lora_B", prefix), parts, lora.rank)
            for prefix, weight, parts in chosen_weights(lora.parts, cls.separate)
        )
        return super().entry(op)._replace(a=pairs[0].a, b=pairs[0].b, spread=None, pairs=pairs)

    @classmethod
    def initialise(cls, entry: Adapter, tensors: Mapping[str, Tensor], module: nn.Module) -> None:
        with torch.no_grad():
            for a, b in entry.apart(tensors.__getitem__):
                cls._start(entry, a, b, module)

    @classmethod
    def merging(
        cls, entry: Adapter, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
    ) -> Mapping[str, Merging]:
        found = {}
        for pair in entry.pairs:
            a, b = pair.factors(tensors.__getitem__)
            found[pair.weight] = LowRank.of(b, a, entry.scale)
        return found

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        if not self._lora:
            return super(LoraModule, self).forward(*args, **kwargs)
        return super(LoraModule, self._stand_in()).forward(*args, **kwargs)

    def _stand_in(self) -> LoraAttention:
        """Has all that this has, and other weights."""
        weights: dict[str, Tensor] = {}
        for adapter in self._lora:
            for pair in adapter.pairs:
                a, b = pair.factors(lambda name: cast(Tensor, getattr(self, name)))
                weight = weights[pair.weight] if pair.weight in weights else attrgetter(pair.weight)(self)
                weights[pair.weight] = weight + (b @ a * adapter.scale).to(weight.dtype)
        modules = dict(self._modules)
        out = weights.pop("out_proj.weight", None)
        if out is not None:
            modules["out_proj"] = _twin(cast(nn.Module, modules["out_proj"]), weight=out)
        twin = _twin(self, **weights)
        twin.__dict__["_modules"] = modules
        return cast(LoraAttention, twin)


class LoraSeparateAttention(LoraAttention):
    """The same where keys or values have a width of their own, and q, k and v so weights of their own."""

    separate = True


def _twin(module: nn.Module, **weights: Tensor) -> nn.Module:
    cls: type[nn.Module] = type(module)
    if is_parametrized(module):
        # Its class has properties of the weights' names, which would stand before them.
        computed = list(module.parametrizations)  # type: ignore[arg-type]
        weights = {name: getattr(module, name) for name in computed if name not in weights} | weights
        cls = cls.__bases__[0]
    twin = object.__new__(cls)
    twin.__dict__.update(module.__dict__)
    twin.__dict__["_parameters"] = {**module._parameters, **weights}
    return twin
