"""What the ops on attention share: which modules they accept, and what these know of themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from .calls import refuse_uncalled
from .megatron import refuse_other_scaling
from .op import Op, Refusal, Target


class AttentionOp(Op):
    """An op that changes how scores become weights, in one of four kinds of attention: Transformers' (through its
    attention interface), `nn.MultiheadAttention`, megatron-core's `DotProductAttention`, and modules that call
    `F.scaled_dot_product_attention`."""

    accepts: ClassVar = {
        "torch.nn.modules.activation.MultiheadAttention": "graphpatch.rewrites.attention_torch:TorchAttention",
        "megatron.core.transformer.dot_product_attention.DotProductAttention": (
            "graphpatch.megatron.attention:MegatronAttention"
        ),
        "*": "graphpatch.rewrites.attention_sdpa:SdpaAttention",
    }
    level: ClassVar[int] = 5

    def through(self, target: Target, row: str) -> str:
        of_library = any(name.startswith("transformers.models.") for name in target.signature.mro)
        configured = target.signature.config >= 0 or target.config is not None
        if row.endswith("SdpaAttention") and of_library and configured:
            return "graphpatch.rewrites.attention_transformers:TransformersAttention"
        return row

    def check(self, target: Target) -> None:
        refuse_uncalled(target, self.op)
        refuse_other_scaling(target)
        if any(name.startswith("megatron.core.extensions.") for name in target.signature.mro):
            raise Refusal(
                f"{target.signature.cls} computes attention in a library of its own, which `{self.op}` cannot change",
                "build the layers with the local spec: get_gpt_layer_local_spec",
                code="GP950",
            )
        if not target.path:
            raise Refusal("the root is the whole model", "target its attention modules: `@attn`")

    def after(self, target: Target) -> str:
        return f"{self.word} {target.signature.cls}"

    word: ClassVar[str] = "changed"


def known(target: Target, *names: str) -> Any:
    """What the target, or the config around it, says under one of these names; None where nothing."""
    places: tuple[Mapping[str, Any], ...] = (target.signature.attributes, target.config or {})
    return next((place[name] for place in places for name in names if place.get(name) is not None), None)
