"""Keep what a module puts out within bounds."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from .calls import refuse_uncalled
from .megatron import refuse_other_scaling
from .op import Op, Refusal, Target
from .registry import register

Cap = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
"""A bound; `true` is none."""


@register("softcap.output")
class SoftcapOutput(Op):
    """y = cap * tanh(f(x) / cap), on the module's output, or on the first of a tuple of outputs: smooth, and within
    (-cap, cap).

    Gemma Team, arXiv:2408.00118, section 2 (logit soft-capping), caps the logits at 30; computed in the output's dtype
    and in Transformers' order: divided, tanh, multiplied. A loss that the model works out from its logits is that of
    the capped ones.
    """

    accepts: ClassVar = {"*": "graphpatch.rewrites.softcap_output:SoftcapOutput"}
    level: ClassVar[int] = 70
    acts_on_output: ClassVar[bool] = True

    cap: Cap

    def check(self, target: Target) -> None:
        refuse_uncalled(target, self.op)
        refuse_other_scaling(target)
        config, words = target.config or {}, target.signature.attributes.get("out_features")
        known = config.get("final_logit_softcapping")
        if known is not None and words is not None and words == config.get("vocab_size"):
            raise Refusal(
                f"the model caps its logits itself, at {known:g} (config.final_logit_softcapping): not twice",
                "leave it out, or change the config",
                code="GP562",
            )

    def after(self, target: Target) -> str:
        return f"capped {target.signature.cls}"
