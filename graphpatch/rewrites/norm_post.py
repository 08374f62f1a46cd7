"""`norm.post` on any module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, cast

from torch import Tensor, nn

from ..ops.norm_post import NormPost
from ..ops.op import Op
from .norm import Norm, fill_norms
from .outputs import on_first
from .rewrite import InPlace


class After(NamedTuple):
    kind: str
    eps: float
    zero_centered: bool
    dim: int
    text: str


class NormPosted(InPlace):
    """Norms the output, or the first of a tuple of outputs."""

    level: ClassVar[int] = NormPost.level
    entries: ClassVar[str] = "_norm_post"
    _norm_post: tuple[After, ...] = ()
    post_norm: Norm

    @classmethod
    def entry(cls, op: Op, parameter: str | None = None) -> After:
        norm = cast(NormPost, op)
        assert norm.eps is not None and norm.dim is not None
        return After(norm.kind, norm.eps, norm.zero_centered, norm.dim, norm.text())

    @classmethod
    def submodules(cls, entry: After, module: nn.Module) -> Mapping[str, nn.Module]:
        return {"post_norm": Norm(entry.dim, entry.kind, entry.eps, entry.zero_centered)}

    @classmethod
    def initialise(cls, entry: After, tensors: Mapping[str, Tensor], module: nn.Module) -> None:
        fill_norms(tensors, entry.zero_centered)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        return on_first(output, self.post_norm, "norm.post") if self._norm_post else output
