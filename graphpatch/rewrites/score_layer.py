"""The layer that a head adds."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class ScoreLayer(nn.Linear):
    """The scores, (..., features) -> (..., labels), with dropout before."""

    def __init__(self, inputs: int, outputs: int, bias: bool, dropout: float):
        super().__init__(inputs, outputs, bias)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.dropout(x, self.dropout, self.training) if self.dropout else x)

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", dropout={self.dropout}" if self.dropout else "")
