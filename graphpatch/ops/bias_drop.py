"""A module without its bias."""

from __future__ import annotations

from typing import ClassVar

from .op import Op, Refusal, Target
from .registry import register

_WITHOUT = (
    "torch.nn.modules.linear.Linear",
    "torch.nn.modules.linear.Bilinear",
    *(f"torch.nn.modules.conv.Conv{kind}{n}d" for kind in ("", "Transpose") for n in (1, 2, 3)),
    "torch.nn.modules.normalization.LayerNorm",
    "torch.nn.modules.normalization.GroupNorm",
    "megatron.core.tensor_parallel.layers.ColumnParallelLinear",
    "megatron.core.tensor_parallel.layers.RowParallelLinear",
)
"""The classes that are built with or without a bias, and compute without one where None stands in its place."""


@register("bias.drop")
class BiasDrop(Op):
    """The target's bias is there no more, as if the module had been built with `bias=False`: y = W x for W x + b.

    Its key leaves the state dict, its elements the optimizer; `revert` puts the very Parameter back. The layers of a
    family are made into those of another that has none so: Qwen 2's queries, keys and values into Qwen 3's. The weights
    are left as they are, so what the model computes does change where the bias was not zero.
    """

    accepts: ClassVar = dict.fromkeys(_WITHOUT, "graphpatch.rewrites.bias_drop:WithoutBias")

    def check(self, target: Target) -> None:
        signature = target.signature
        if "bias" not in signature.parameters:
            raise Refusal(f"this {signature.cls} has no bias", "leave it out: where bias is not none")
        if "bias" in target.tied:
            raise Refusal(f"its bias is that of `{target.tied['bias'][0]}` too", "one shared with others cannot go")

    def drops(self, target: Target) -> tuple[str, ...]:
        return ("bias",)

    def after(self, target: Target) -> str:
        return f"{target.signature.cls} without bias"
