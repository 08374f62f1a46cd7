"""Activations worked out again in the backward pass, in place of being kept."""

from __future__ import annotations

from typing import ClassVar

from .arguments import Flag
from .calls import refuse_uncalled
from .op import Op, Refusal, Target
from .registry import register


@register("checkpoint")
class Checkpoint(Op):
    """The module keeps its inputs alone, and runs once more in the backward pass (Chen et al., arXiv:1604.06174):
    less memory, a third more time, the same gradients.

    `torch.utils.checkpoint` without reentrance, so that adapters in a frozen base get their gradients. Nothing is
    checkpointed where nothing needs a gradient. `preserve_rng` has dropout draw the same again. A block that is given a
    key-value cache while it trains is refused: it would write to it twice.
    """

    accepts: ClassVar = {"*": "graphpatch.rewrites.checkpoint:Checkpointed"}
    level: ClassVar[int] = 100
    exact_at_init: ClassVar[bool] = True

    preserve_rng: Flag = True

    def check(self, target: Target) -> None:
        refuse_uncalled(target, self.op)
        if target.signature.attributes.get("gradient_checkpointing") is True:
            raise Refusal(
                f"{target.signature.cls} checkpoints itself (gradient_checkpointing_enable)",
                "model.gradient_checkpointing_disable() first, or leave this rule out",
                code="GP443",
            )

    def after(self, target: Target) -> str:
        return f"checkpointed {target.signature.cls}"
