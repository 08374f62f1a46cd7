"""`softcap.output` on any module."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple, cast

from torch import Tensor

from ..ops.op import Op
from ..ops.softcap_output import SoftcapOutput as SoftcapOutputOp
from .outputs import on_first
from .rewrite import InPlace


class Bound(NamedTuple):
    cap: float
    text: str


class SoftcapOutput(InPlace):
    """Caps the output, or the first of a tuple of outputs."""

    level: ClassVar[int] = SoftcapOutputOp.level
    entries: ClassVar[str] = "_softcap_output"
    _softcap_output: tuple[Bound, ...] = ()

    @classmethod
    def entry(cls, op: Op, parameter: str | None = None) -> Bound:
        return Bound(cast(SoftcapOutputOp, op).cap, op.text())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        for bound in self._softcap_output:
            output = on_first(output, lambda x, cap=bound.cap: softcapped(x, cap), "softcap.output")  # type: ignore[misc]
        return output


def softcapped(x: Tensor, cap: float) -> Tensor:
    """cap * tanh(x / cap). The quotient is written over, since nothing else holds it. Ends in the multiplication, which
    keeps no output for its backward: megatron-core's cross entropy writes into the logits that it gets."""
    return (x / cap).tanh_() * cap
