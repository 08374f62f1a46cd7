"""`adapter.bottleneck` on any module."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, cast

from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.bottleneck import Bottleneck
from ..ops.op import Op
from .activation import FUNCTIONS
from .outputs import on_first
from .rewrite import InPlace


class Shape(NamedTuple):
    dim: int
    features: int
    act: str
    dropout: float
    residual: bool
    text: str


class DownAndUp(nn.Module):
    """(... x features) -> (... x features), through `dim`."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.down, self.up = nn.Linear(shape.features, shape.dim), nn.Linear(shape.dim, shape.features)
        self.act, self.dropout, self.residual = shape.act, shape.dropout, shape.residual

    def forward(self, x: Tensor) -> Tensor:
        inner = FUNCTIONS[self.act](self.down(x.to(self.down.weight.dtype)))
        update = self.up(F.dropout(inner, self.dropout, self.training)).to(x.dtype)
        return x + update if self.residual else update


class Bottlenecked(InPlace):
    """Adds to the output, or to the first of a tuple of outputs."""

    level: ClassVar[int] = Bottleneck.level
    entries: ClassVar[str] = "_bottleneck"
    _bottleneck: tuple[Shape, ...] = ()
    bottleneck: DownAndUp

    @classmethod
    def entry(cls, op: Op, parameter: str | None = None) -> Shape:
        b = cast(Bottleneck, op)
        assert b.features is not None
        return Shape(b.dim, b.features, b.act, b.dropout, b.residual, b.text())

    @classmethod
    def submodules(cls, entry: Shape, module: nn.Module) -> Mapping[str, nn.Module]:
        return {"bottleneck": DownAndUp(entry)}

    @classmethod
    def initialise(cls, entry: Shape, tensors: Mapping[str, Tensor], module: nn.Module) -> None:
        nn.init.kaiming_uniform_(tensors["bottleneck.down.weight"], a=math.sqrt(5))
        for name in ("down.bias", "up.weight", "up.bias"):
            tensors[f"bottleneck.{name}"].zero_()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        return on_first(output, self.bottleneck, "adapter.bottleneck") if self._bottleneck else output
