"""A norm after a module."""

from __future__ import annotations

from typing import ClassVar

from ..tree.tree import Tensor
from .arguments import Count, Flag
from .calls import refuse_uncalled
from .norm import Kind, epsilon, width
from .norm_replace import Epsilon
from .op import Op, Target
from .registry import register


@register("norm.post")
class NormPost(Op):
    """y = norm(f(x)), on the module's output, or on the first of a tuple of outputs, in the dtype that this has.

    The norm is a new module `post_norm` below the target, with a weight of its own: zeros where `zero_centered` (1 + w
    is what multiplies), else ones, so that an untrained one only normalises. Formulas and rounding are those of
    `norm.replace`. Gemma 2 has such norms after attention and after the feed-forward (Gemma Team, arXiv:2408.00118,
    section 2); what is added to a linear inside, LoRA say, is normed with its output.

    `eps` is that of the config around unless given, `dim` the width of the model.
    """

    accepts: ClassVar = {
        "megatron.core.transformer.attention.Attention": "graphpatch.megatron.norm_post:MegatronNormPosted",
        "megatron.core.transformer.mlp.MLP": "graphpatch.megatron.norm_post:MegatronNormPosted",
        "megatron.core.transformer.moe.moe_layer.BaseMoELayer": "graphpatch.megatron.norm_post:MegatronNormPosted",
        "*": "graphpatch.rewrites.norm_post:NormPosted",
    }
    level: ClassVar[int] = 60
    acts_on_output: ClassVar[bool] = True

    kind: Kind = "rms"
    eps: Epsilon | None = None
    zero_centered: Flag = False
    dim: Count | None = None
    """Features of the output."""

    def resolved(self, target: Target) -> Op:
        dim = self.dim or width(target, f"{self.op}(dim=...)")
        return self.model_copy(update={"eps": epsilon(self.eps, target.config), "dim": dim})

    def check(self, target: Target) -> None:
        refuse_uncalled(target, self.op)

    def adds(self, target: Target) -> dict[str, Tensor]:
        assert self.dim is not None
        return {"post_norm.weight": Tensor((self.dim,), target.dtype)}

    def after(self, target: Target) -> str:
        return f"{target.signature.cls} + norm"
