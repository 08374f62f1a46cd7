"""Keep attention scores within bounds."""

from __future__ import annotations

from typing import ClassVar

from .attention import AttentionOp, known
from .op import Refusal, Target
from .registry import register
from .softcap_output import Cap


@register("softcap.attention")
class SoftcapAttention(AttentionOp):
    """softmax(cap * tanh(scale * q k^T / cap) + mask) v: scores stay within (-cap, cap) before the mask is added.

    Gemma Team, arXiv:2408.00118, section 2 (logit soft-capping), caps at 50. Transformers' `eager` and `flex_attention`
    can cap; under `sdpa` the capped modules compute as `eager` does, which is warned of; other backends are refused. A
    model that caps its scores itself is refused, so that none is capped twice.
    """

    word: ClassVar[str] = "capped"

    cap: Cap

    def check(self, target: Target) -> None:
        super().check(target)
        there = known(target, "attn_logit_softcapping", "attn_logit_softcap", "softcap")
        if there is not None:
            raise Refusal(
                f"{target.signature.cls} caps its scores itself, at {there}: not twice",
                "leave it out, or change the model's config",
                code="GP465",
            )
