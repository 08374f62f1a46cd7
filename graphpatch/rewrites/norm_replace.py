"""`norm.replace` on a norm of any class."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple, cast

from torch import Tensor

from ..ops.norm_replace import NormReplace
from ..ops.op import Op
from .norm import normed
from .rewrite import InPlace


class Formula(NamedTuple):
    kind: str
    eps: float | None
    zero_centered: bool
    text: str


class NormReplaced(InPlace):
    """Computes by another formula."""

    level: ClassVar[int] = NormReplace.level
    entries: ClassVar[str] = "_norm_replace"
    _norm_replace: tuple[Formula, ...] = ()
    weight: Tensor | None

    @classmethod
    def entry(cls, op: Op, parameter: str | None = None) -> Formula:
        norm = cast(NormReplace, op)
        return Formula(norm.kind, norm.eps, norm.zero_centered, norm.text())

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not self._norm_replace:
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        kind, eps, zero_centered, _ = self._norm_replace[-1]
        return normed(x, self.weight, getattr(self, "bias", None), kind, eps, zero_centered)
