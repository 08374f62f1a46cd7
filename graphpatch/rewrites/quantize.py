"""`quantize.nf4`, `quantize.int8` and `quantize.int4` on a linear."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn

from ..ops.op import Op
from ..ops.quantize import QuantizeInt4, QuantizeNF4
from .quantised_formats import NF4, Format, Int4, Int8
from .quantised_tensor import QuantisedTensor
from .rewrite import Weights


class Quantized(Weights):
    """The weight as codes, in the same place."""

    @staticmethod
    def values(op: Op, module: nn.Module) -> Mapping[str, Tensor]:
        weight = cast(Any, module).weight.detach()
        return {"weight": QuantisedTensor.of(weight, _format(op))}

    @staticmethod
    def keeps(op: Op) -> bool:
        return bool(cast(Any, op).keep)


def _format(op: Op) -> Format:
    if isinstance(op, QuantizeNF4):
        return NF4(op.block)
    return Int4(op.group) if isinstance(op, QuantizeInt4) else Int8()
