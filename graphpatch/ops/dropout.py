"""Another rate of dropout, or dropout where there was none."""

from __future__ import annotations

from typing import ClassVar

from .arguments import Share
from .calls import refuse_uncalled
from .op import Op, Refusal, Target
from .registry import register


@register("dropout")
class Dropout(Op):
    """In training, each value is zero with probability p, and those that stay are divided by 1 - p (Srivastava et al.,
    JMLR 15, 2014, section 10). On an `nn.Dropout` p takes the place of its own; on any other module it acts on the
    output, or on the first of a tuple of outputs.
    """

    accepts: ClassVar = {
        "torch.nn.modules.dropout._DropoutNd": "graphpatch.rewrites.dropout:DropoutRate",
        "*": "graphpatch.rewrites.dropout:DroppedOut",
    }
    level: ClassVar[int] = 40
    acts_on_output: ClassVar[bool] = True

    p: Share

    def check(self, target: Target) -> None:
        refuse_uncalled(target, self.op)
        if self.p == 0 and not is_dropout(target):
            raise Refusal("p=0 drops nothing", "give it a rate, or leave the rule out")

    def after(self, target: Target) -> str:
        return target.signature.cls if is_dropout(target) else f"{target.signature.cls} + dropout"


def is_dropout(target: Target) -> bool:
    return "torch.nn.modules.dropout._DropoutNd" in target.signature.mro
