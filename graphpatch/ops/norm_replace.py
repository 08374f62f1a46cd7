"""Let a norm compute another norm, with the weight that it has."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from .arguments import Flag
from .calls import refuse_uncalled
from .norm import Kind, own_epsilon
from .op import Op, Refusal, Target
from .registry import register

Epsilon = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]


@register("norm.replace")
class NormReplace(Op):
    """Another formula over the target's own weight; the module, its parameters and their names stay.

    - `kind="rms"`: y = x / sqrt(mean(x^2) + eps) * w (Zhang and Sennrich, arXiv:1910.07467, equation 4)
    - `kind="layer"`: y = (x - mean(x)) / sqrt(var(x) + eps) * w (Ba et al., arXiv:1607.06450, equation 4)

    over the last dimensions of x, as many as w has. With `zero_centered`, 1 + w stands for w, as in Gemma: a weight of
    zeros is the plain norm. A bias that the target has is added as before.

    RMS norms are computed in float32 and rounded as Transformers rounds them: as Gemma does with `zero_centered`, the
    product with (1 + w) in float32 and then the dtype of x; as Llama does without, first the dtype of x, then the
    product with w. `eps` is the target's own unless given.
    """

    accepts: ClassVar = {"*": "graphpatch.rewrites.norm_replace:NormReplaced"}
    level: ClassVar[int] = 0

    kind: Kind = "rms"
    eps: Epsilon | None = None
    zero_centered: Flag = False

    def resolved(self, target: Target) -> Op:
        return (
            self if self.eps is not None else self.model_copy(update={"eps": own_epsilon(target.signature.attributes)})
        )

    def check(self, target: Target) -> None:
        refuse_uncalled(target, self.op)
        signature = target.signature
        weight = signature.parameters.get("weight")
        if signature.parameters.keys() - {"weight", "bias"} or (weight is None and "bias" in signature.parameters):
            raise Refusal(
                f"{signature.cls} holds {', '.join(signature.parameters)}, and a norm a weight, and maybe a bias"
            )
        # A tree without classes has shapes alone to go by.
        if signature.mro and not any("norm" in name.rpartition(".")[2].lower() for name in signature.mro):
            raise Refusal(f"{signature.cls} is no norm", "target the norms: `:*Norm`", code="GP560")
        if any(word in signature.cls for word in ("Gated", "BatchNorm", "GroupNorm", "InstanceNorm")):
            raise Refusal(
                f"{signature.cls} takes more than the features of each position, and neither kind is that",
                "leave it out: except :" + signature.cls,
                code="GP560",
            )
        if weight is not None and weight.dtype != "uninitialized" and not 1 <= len(weight.shape) <= 3:
            raise Refusal(f"its weight has the shape {list(weight.shape)}", code="GP560")
        told = "elementwise_affine" in signature.attributes or weight is not None
        if self.zero_centered and weight is None:
            raise Refusal("it has no weight, so `zero_centered` would have no effect", "leave it out", code="GP560")
        if not told and self.eps is None:
            raise Refusal(f"{signature.cls} has neither a weight nor an epsilon", "say eps=...", code="GP560")
        if self.eps is None and not any(name.startswith("torch.nn.modules.normalization.") for name in signature.mro):
            raise Refusal(f"{signature.cls} has no attribute that is its epsilon", "say it: eps=1e-6", code="GP561")

    def after(self, target: Target) -> str:
        return f"{'zero-centred ' if self.zero_centered else ''}{_WORDS[self.kind]}"


_WORDS = {"rms": "RMS norm", "layer": "layer norm"}
