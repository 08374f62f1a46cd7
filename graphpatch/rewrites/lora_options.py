"""LoRA's options, told once for every kind whose module applies one weight to its input: a trained bias, DoRA's
magnitude, and factors that are told from what they started from."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from .dora import ColumnsToLengths, RowsToLengths, gain
from .lora_base import Adapter, LoraModule
from .lora_init import pissa
from .merging import LowRank, Merging, Unmergeable


class LoraOfWeight(LoraModule):
    """What an adapter adds, with all its options; a kind says how a weight and factors are applied to an input."""

    bias: Tensor | None
    transposed: ClassVar[bool] = False
    """Whether the weight is stored (in, out)."""

    @classmethod
    def merging(
        cls, entry: Adapter, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
    ) -> Mapping[str, Merging]:
        gained = cls._gained(*entry.factors(tensors.__getitem__), entry.scale, shapes.get("weight", ()))
        if entry.magnitude:
            scaled = ColumnsToLengths if cls.transposed else RowsToLengths
            return {"weight": scaled(gained, tensors[entry.magnitude])}
        if not entry.bias:
            return {"weight": gained}
        if "bias" not in shapes:
            raise Unmergeable(
                "its trained bias has no place in a base without one",
                "leave the adapter beside the weight, or train it without bias=true",
            )
        bias = tensors[entry.bias]
        return {"weight": gained, "bias": LowRank.of(bias[:, None], torch.ones_like(bias[:1, None]), entry.scale)}

    @classmethod
    def approach(cls, entry: Adapter, tensors: Mapping[str, Tensor], module: nn.Module, original: Tensor) -> None:
        """s B A the principal part of what quantising took from the weight."""
        wide = torch.promote_types(original.dtype, torch.float32)
        lost = (original.t() if cls.transposed else original).to(wide) - cls.matrix(module).to(wide)
        pissa(tensors[entry.a], tensors[entry.b], entry.scale, lambda: lost, None)
        if entry.magnitude:
            tensors[entry.magnitude].copy_(cls.row_norms(entry, tensors.__getitem__, module))

    @classmethod
    def _gained(cls, a: Tensor, b: Tensor, scale: float, shape: tuple[int, ...]) -> LowRank:
        """s B A, as the weight is stored, in a `shape`."""
        return LowRank.of(a.t(), b.t(), scale) if cls.transposed else LowRank.of(b, a, scale)

    def _low_rank(self, z: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        """scale * B A z."""
        raise NotImplementedError

    def _product(self, z: Tensor) -> Tensor:
        """W z, without the bias."""
        raise NotImplementedError

    def _along_rows(self, vector: Tensor) -> Tensor:
        """A vector (out,) in a shape that is multiplied with an output."""
        return vector

    def _dropped(self, adapter: Adapter, input: Tensor) -> Tensor:
        return dropout(input, adapter.dropout) if adapter.dropout and self.training else input

    def _update(self, adapter: Adapter, input: Tensor) -> Tensor:
        z = self._dropped(adapter, input)
        return self._low_rank(z, getattr(self, adapter.a), getattr(self, adapter.b), adapter.scale)

    def _addend(self, adapter: Adapter, input: Tensor, output: Tensor) -> Tensor:
        if adapter.plain:
            return self._update(adapter, input)
        if adapter.dropout and self.training:
            return self._dropped_addend(adapter, input)
        added = self._low_rank(input, *adapter.factors(partial(getattr, self)), adapter.scale)
        if adapter.bias:
            return added + self._scaled_bias(adapter, added)
        if adapter.magnitude:
            return added + self._gain_less_one(adapter, output) * (self._unbiased(output) + added)
        return added

    def _unbiased(self, output: Tensor) -> Tensor:
        """Of the base's output, W x."""
        return output if self.bias is None else output - self._along_rows(self.bias).to(output.dtype)

    def _dropped_addend(self, adapter: Adapter, input: Tensor) -> Tensor:
        """As in PEFT: all that the adapter does to the weight sees the dropped input, DoRA's share of W among it; what
        PiSSA and OLoRA take out of the weight is out for the whole input."""
        z, scale = self._dropped(adapter, input), adapter.scale
        added = self._low_rank(z, *adapter.pair(partial(getattr, self)), scale)
        start = [getattr(self, name) for name in adapter.started]
        if adapter.bias:
            added = added + self._scaled_bias(adapter, added)
        if adapter.magnitude:
            product = self._product(z)
            if start:
                product = product - self._low_rank(z, start[0], start[1], scale)
            added = added + self._gain_less_one(adapter, added) * (product + added)
        return added - self._low_rank(input, start[0], start[1], scale) if start else added

    def _scaled_bias(self, adapter: Adapter, like: Tensor) -> Tensor:
        return self._along_rows(self._vector(adapter.bias) * adapter.scale).to(like.dtype)

    def _gain_less_one(self, adapter: Adapter, like: Tensor) -> Tensor:
        """What DoRA multiplies the rows of the weight by, less one: zero at the start, and small in half precision."""
        norms = self.row_norms(adapter, partial(getattr, self), self)
        return self._along_rows(gain(self._vector(adapter.magnitude), norms) - 1).to(like.dtype)

    def _vector(self, name: str) -> Tensor:
        """One of the adapter's own vectors (out,)."""
        return getattr(self, name)  # type: ignore[no-any-return]
