"""A small network after a module."""

from __future__ import annotations

from typing import ClassVar

from ..tree.tree import Tensor
from .activation import Function
from .arguments import Count, Flag, Share
from .calls import refuse_uncalled
from .norm import width
from .op import Op, Target
from .registry import register


@register("adapter.bottleneck")
class Bottleneck(Op):
    """y = h + up(act(down(h))) for h = f(x), on the module's output, or on the first of a tuple of outputs.

    Houlsby et al., arXiv:1902.00751, section 2.1: `down` (dim x features) and `up` (features x dim), each with a bias,
    are a new module `bottleneck` below the target. `up` starts at zero, so that the model computes what it did until it
    is trained. Without `residual`, y is up(act(down(h))) alone. `insert_after("output", adapter.bottleneck(dim=64))`
    means the same.
    """

    accepts: ClassVar = {"*": "graphpatch.rewrites.bottleneck:Bottlenecked"}
    level: ClassVar[int] = 65
    acts_on_output: ClassVar[bool] = True

    dim: Count
    act: Function = "gelu"
    dropout: Share = 0.0
    residual: Flag = True
    features: Count | None = None
    """Of the target's output, where neither it nor a config says so."""

    def resolved(self, target: Target) -> Op:
        return self.model_copy(update={"features": self.features or width(target, f"{self.op}(features=...)")})

    def check(self, target: Target) -> None:
        refuse_uncalled(target, self.op)

    def adds(self, target: Target) -> dict[str, Tensor]:
        assert self.features is not None
        return {
            "bottleneck.down.weight": Tensor((self.dim, self.features), target.dtype),
            "bottleneck.down.bias": Tensor((self.dim,), target.dtype),
            "bottleneck.up.weight": Tensor((self.features, self.dim), target.dtype),
            "bottleneck.up.bias": Tensor((self.features,), target.dtype),
        }

    def after(self, target: Target) -> str:
        return f"{target.signature.cls} + bottleneck"
