"""`scale.output` on any module."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor

from ..ops.op import Op
from ..ops.scale import ScaleOutput as ScaleOutputOp
from .outputs import on_first
from .rewrite import InPlace


class Factor(NamedTuple):
    by: float
    rounded: bool
    text: str


class ScaleOutput(InPlace):
    """Multiplies the output, or the first of a tuple of outputs."""

    level: ClassVar[int] = ScaleOutputOp.level
    entries: ClassVar[str] = "_scale_output"
    _scale_output: tuple[Factor, ...] = ()

    @classmethod
    def entry(cls, op: Op, parameter: str | None = None) -> Factor:
        scale = cast(ScaleOutputOp, op)
        return Factor(scale.by, scale.rounded, scale.text())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        for factor in self._scale_output:
            output = on_first(output, lambda x, by=factor: _scaled(x, by), "scale.output")  # type: ignore[misc]
        return output


def _scaled(x: Tensor, factor: Factor) -> Tensor:
    if factor.rounded:
        return x * torch.full((), factor.by, dtype=x.dtype, device=x.device)
    return x * factor.by
