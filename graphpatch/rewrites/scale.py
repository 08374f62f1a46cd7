"""`scale.output` on any module."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor

from ..lang.diagnostics import ApplyError, Diagnostic
from ..ops.op import Op
from ..ops.scale import ScaleOutput as ScaleOutputOp
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
            output = _scaled(output, factor)
        return output


def _scaled(output: Any, factor: Factor) -> Any:
    if isinstance(output, Tensor):
        if factor.rounded:
            return output * torch.full((), factor.by, dtype=output.dtype, device=output.device)
        return output * factor.by
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        first = _scaled(output[0], factor)
        rest = (first, *output[1:])
        # A named tuple is made of its fields one by one.
        return type(output)(*rest) if hasattr(output, "_fields") else type(output)(rest)
    raise ApplyError(
        Diagnostic(
            "GP520",
            f"scale.output cannot scale a {type(output).__name__}",
            text=("it multiplies a tensor, or the first of a tuple",),
            fixes=("target a module further in, whose output is a tensor",),
        )
    )
