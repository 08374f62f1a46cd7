"""Multiply what a module puts out."""

from __future__ import annotations

from typing import ClassVar

from .arguments import Flag, Real
from .calls import refuse_uncalled
from .megatron import refuse_other_scaling
from .op import Op, Target
from .registry import register


@register("scale.output")
class ScaleOutput(Op):
    """y = by * f(x), on the module's output, or on the first of a tuple of outputs.

    `by` is a number of double precision and the product is rounded once, in the dtype of the output. Implementations
    that keep the factor as a tensor of the weight's dtype round it before (Gemma's sqrt(hidden_size) in Transformers
    does: in bfloat16 sqrt(3072) = 55.43 becomes 55.5); `rounded=true` gives their numbers, bit for bit.

    Gemma Team, arXiv:2403.08295, scales embeddings by sqrt(hidden_size); mu-P (arXiv:2203.03466, table 8) the logits.
    """

    accepts: ClassVar = {"*": "graphpatch.rewrites.scale:ScaleOutput"}
    level: ClassVar[int] = 50
    acts_on_output: ClassVar[bool] = True

    by: Real
    rounded: Flag = False
    """Round `by` to the output's dtype first."""

    def check(self, target: Target) -> None:
        refuse_uncalled(target, "scale.output")
        refuse_other_scaling(target)

    def after(self, target: Target) -> str:
        return f"scaled {target.signature.cls}"
