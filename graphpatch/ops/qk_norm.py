"""Norms on queries and keys."""

from __future__ import annotations

from typing import ClassVar

from ..tree.tree import Tensor
from .arguments import Count, Flag
from .attention import known
from .norm import Kind, epsilon
from .norm_replace import Epsilon
from .op import Op, Refusal, Target
from .registry import register


@register("qk_norm")
class QkNorm(Op):
    """Each head's query and key are normed after their projections, before rotary positions (Henry et al.,
    arXiv:2010.04245; Qwen3, arXiv:2505.09388, section 2).

    The norms are new modules `q_norm` and `k_norm` below the target, of `head_dim` features, with the formulas and the
    rounding of `norm.replace`. The target is an attention module that projects by `q_proj` and `k_proj`; LoRA on these
    is normed with them. `eps` is that of the config around unless given.
    """

    accepts: ClassVar = {"*": "graphpatch.rewrites.qk_norm:QkNormed"}
    level: ClassVar[int] = 15

    kind: Kind = "rms"
    eps: Epsilon | None = None
    zero_centered: Flag = False
    head_dim: Count | None = None
    """Features of a head."""

    def resolved(self, target: Target) -> Op:
        head_dim = self.head_dim or known(target, "head_dim")
        return self.model_copy(update={"eps": epsilon(self.eps, target.config), "head_dim": head_dim})

    def check(self, target: Target) -> None:
        if not isinstance(self.head_dim, int):
            raise Refusal(f"{target.signature.cls} says of no head_dim", "say it: qk_norm(head_dim=...)")

    def adds(self, target: Target) -> dict[str, Tensor]:
        assert self.head_dim is not None
        return {f"{name}.weight": Tensor((self.head_dim,), target.dtype) for name in ("q_norm", "k_norm")}

    def after(self, target: Target) -> str:
        return f"{target.signature.cls} + norms"
