"""`dropout`: another rate for a dropout module, dropout after any other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, cast

from torch import nn
from torch.nn import functional as F

from ..ops.dropout import Dropout
from ..ops.op import Op
from .outputs import on_first
from .rewrite import Attributes, InPlace


class DropoutRate(Attributes):
    """Another `p`."""

    @staticmethod
    def values(op: Op, module: nn.Module) -> Mapping[str, Any]:
        return {"p": cast(Dropout, op).p}


class Rate(NamedTuple):
    p: float
    text: str


class DroppedOut(InPlace):
    """Drops values of the output, in training."""

    level: ClassVar[int] = Dropout.level
    entries: ClassVar[str] = "_dropout"
    _dropout: tuple[Rate, ...] = ()

    @classmethod
    def entry(cls, op: Op, parameter: str | None = None) -> Rate:
        return Rate(cast(Dropout, op).p, op.text())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        if not (self._dropout and self.training):
            return output
        return on_first(output, lambda x: F.dropout(x, self._dropout[-1].p), "dropout")
