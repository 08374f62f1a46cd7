"""Rotary positions for longer texts than a model was made for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from .arguments import Count, Real
from .op import Op, Refusal, Target
from .registry import register

_TAKES = {
    "linear": set(),
    "ntk": set(),
    "dynamic": set(),
    "yarn": {"original", "attention_factor", "beta_fast", "beta_slow"},
    "llama3": {"original", "low_freq_factor", "high_freq_factor"},
}
_ORIGINAL = "original_max_position_embeddings"


@register("rope.scale")
class RopeScale(Op):
    """Rotary embeddings (Su et al., arXiv:2104.09864) stretched by `factor`, as Transformers' `rope_parameters` of that
    kind stretch them:

    - `linear`: positions divided by the factor (Chen et al., arXiv:2306.15595)
    - `dynamic`, or `ntk`: the base grown with the length, past the model's own (NTK-aware scaling)
    - `yarn`: high frequencies kept, low ones interpolated, a ramp between (Peng et al., arXiv:2309.00071)
    - `llama3`: the same by wavelength (Llama 3.1)

    The target is the rotary module of a Transformers model, which one of the same class takes the place of; it has no
    weights. `original` is the length that the model was trained on, else its config's `max_position_embeddings`.
    """

    accepts: ClassVar = {"*": "graphpatch.rewrites.rope_scale:RopeScaled"}
    symbol: ClassVar[Literal["~", "+", "-/+"]] = "-/+"
    exclusive: ClassVar[bool] = True

    kind: Literal["linear", "ntk", "dynamic", "yarn", "llama3"]
    factor: Annotated[float, Field(strict=True, ge=1, allow_inf_nan=False)]
    original: Count | None = None
    """Positions that the model was trained on."""
    attention_factor: Real | None = None
    beta_fast: Real | None = None
    beta_slow: Real | None = None
    low_freq_factor: Real | None = None
    high_freq_factor: Real | None = None

    @model_validator(mode="after")
    def _takes(self) -> RopeScale:
        given = {name for name, value in self if value is not None} - {"kind", "factor"}
        odd = sorted(given - _TAKES[self.kind])
        if odd:
            takes = ", ".join(sorted(_TAKES[self.kind])) or "the factor alone"
            raise ValueError(f'`{odd[0]}` has no effect with kind="{self.kind}", which takes {takes}')
        if self.kind == "llama3" and (self.low_freq_factor is None or self.high_freq_factor is None):
            raise ValueError('kind="llama3" needs low_freq_factor and high_freq_factor (1.0 and 4.0 in Llama 3.1)')
        return self

    def slots(self) -> frozenset[str]:
        return frozenset({"module"})

    def parameters(self, before: Mapping[str, Any], positions: int) -> dict[str, Any]:
        """Transformers' `rope_parameters`, from those that were there."""
        found: dict[str, Any] = {"rope_theta": before["rope_theta"]} if "rope_theta" in before else {}
        found |= {"partial_rotary_factor": before["partial_rotary_factor"]} if "partial_rotary_factor" in before else {}
        found |= {"rope_type": "dynamic" if self.kind == "ntk" else self.kind, "factor": self.factor}
        if "original" in _TAKES[self.kind]:
            found[_ORIGINAL] = self.original or before.get(_ORIGINAL) or positions
        names = ("attention_factor", "beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor")
        return found | {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def check(self, target: Target) -> None:
        signature = target.signature
        if signature.mro and "rotary" not in signature.cls.lower() and "rope" not in signature.cls.lower():
            raise Refusal(f"{signature.cls} is no rotary embedding", "target it: `rotary_emb`", code="GP442")

    def after(self, target: Target) -> str:
        return f"{self.kind} {target.signature.cls}"
