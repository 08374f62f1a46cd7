"""What heads that score share, whatever model they stand on: the layer that they add, and what is known of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, NamedTuple, cast

from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.head_classify import Score, ScoreHead
from ..ops.op import Op
from .head import OnModel, fill_linear


class ScoreLayer(nn.Linear):
    """The scores, (..., features) -> (..., labels), with dropout before."""

    def __init__(self, inputs: int, outputs: int, bias: bool, dropout: float):
        super().__init__(inputs, outputs, bias)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.dropout(x, self.dropout, self.training) if self.dropout else x)

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", dropout={self.dropout}" if self.dropout else "")


class Scoring(NamedTuple):
    score: Score
    at: str | None
    hidden: int
    op: str
    text: str


class Scores(OnModel):
    """Holds a `ScoreLayer`, under the name that the op gives it."""

    level: ClassVar[int] = ScoreHead.level
    entries: ClassVar[str] = "_head"
    _head: tuple[Scoring, ...] = ()

    @classmethod
    def entry(cls, op: Op, parameter: str | None = None) -> Scoring:
        head = cast(ScoreHead, op)
        assert head.hidden is not None
        return Scoring(head.score, head.at, head.hidden, head.op, head.text())

    @classmethod
    def submodules(cls, entry: Scoring, module: nn.Module) -> Mapping[str, nn.Module]:
        score = entry.score
        return {score.name: ScoreLayer(entry.hidden, len(score.names), score.bias, score.dropout)}

    @classmethod
    def initialise(cls, entry: Scoring, tensors: Mapping[str, Tensor], module: nn.Module) -> None:
        fill_linear(module, tensors, entry.score.name, entry.score.init)
