"""Rotary positions for longer texts than a model was made for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from .arguments import Count, Flag, Real, Text
from .op import Op, Refusal, Target
from .registry import register

_TAKES: dict[str, set[str]] = {
    "linear": set(),
    "ntk": set(),
    "dynamic": set(),
    "yarn": {"original", "attention_factor", "beta_fast", "beta_slow", "truncate"},
    "longrope": {"original", "attention_factor", "short_factor", "long_factor"},
    "llama3": {"original", "low_freq_factor", "high_freq_factor"},
}
_NEEDS = {
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("low_freq_factor", "high_freq_factor"),
}
_HINTS = {
    "longrope": "two lists, each with a number for each pair of features that are rotated",
    "llama3": "1.0 and 4.0 in Llama 3.1",
}
ORIGINAL = "original_max_position_embeddings"
_OF_A_KIND = {"rope_type", "type", "factor", ORIGINAL, "mscale", "mscale_all_dim"}.union(*_TAKES.values())
"""What a set of `rope_parameters` says of the way it is stretched; all else it says stays."""
_WHOLE = "full_attention"

Factors = tuple[Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)], ...]


@register("rope.scale")
class RopeScale(Op):
    """Rotary embeddings (Su et al., arXiv:2104.09864) stretched by `factor`, as Transformers' `rope_parameters` of that
    kind stretch them:

    - `linear`: positions divided by the factor (Chen et al., arXiv:2306.15595)
    - `dynamic`, or `ntk`: the base grown with the length, past the model's own (NTK-aware scaling)
    - `yarn`: high frequencies kept, low ones interpolated, a ramp between (Peng et al., arXiv:2309.00071)
    - `longrope`: each frequency divided by a factor of its own, `long_factor` past the original length and
      `short_factor` up to it (Ding et al., arXiv:2402.13753)
    - `llama3`: the low frequencies by wavelength (Llama 3.1)

    The target is the rotary module of a Transformers model, which one of the same class takes the place of; it has no
    weights. What its `rope_parameters` say beside (`rope_theta`, `partial_rotary_factor`, `mrope_section`) stays, and
    where they are of this kind already, so does what the rule leaves open. `original` is the length that the model was
    trained on, else as the config has it.

    A model with a set for each type of layers (Gemma 3, ModernBERT) is stretched in those of `layer_type`, unless given
    those that attend to the whole text, `full_attention`: its windows are no longer than they were.
    """

    accepts: ClassVar = {"*": "graphpatch.rewrites.rope_scale:RopeScaled"}
    symbol: ClassVar[Literal["~", "+", "-/+"]] = "-/+"
    exclusive: ClassVar[bool] = True

    kind: Literal["linear", "ntk", "dynamic", "yarn", "longrope", "llama3"]
    factor: Annotated[float, Field(strict=True, ge=1, allow_inf_nan=False)]
    original: Count | None = None
    """Positions that the model was trained on."""
    attention_factor: Real | None = None
    beta_fast: Real | None = None
    beta_slow: Real | None = None
    truncate: Flag | None = None
    """Whether the ends of the ramp are whole features."""
    short_factor: Factors | None = None
    long_factor: Factors | None = None
    low_freq_factor: Real | None = None
    high_freq_factor: Real | None = None
    layer_type: Text | None = None

    @model_validator(mode="after")
    def _takes(self) -> RopeScale:
        given = {name for name, value in self if value is not None} - {"kind", "factor", "layer_type"}
        odd = sorted(given - _TAKES[self.kind])
        if odd:
            takes = ", ".join(sorted(_TAKES[self.kind])) or "the factor alone"
            raise ValueError(f'`{odd[0]}` has no effect with kind="{self.kind}", which takes {takes}')
        missing = [name for name in _NEEDS.get(self.kind, ()) if getattr(self, name) is None]
        if missing:
            names = " and ".join(_NEEDS[self.kind])
            raise ValueError(f'kind="{self.kind}" needs {names} ({_HINTS[self.kind]})')
        return self

    def slots(self) -> frozenset[str]:
        return frozenset({"module"})

    def resolved(self, target: Target) -> Op:
        types = _layer_types((target.config or {}).get("rope_parameters"))
        if not types:
            if self.layer_type is not None and target.config is not None:
                raise Refusal("its rope_parameters are one set for all layers", "leave out layer_type", code="GP564")
            return self
        wanted = self.layer_type or _WHOLE
        if wanted not in types:
            listed = ", ".join(f'"{name}"' for name in types)
            raise Refusal(f"its rope_parameters are a set for each of {listed}", "say which: layer_type=", code="GP564")
        return self.model_copy(update={"layer_type": wanted})

    def check(self, target: Target) -> None:
        signature = target.signature
        if signature.mro and "rotary" not in signature.cls.lower() and "rope" not in signature.cls.lower():
            raise Refusal(f"{signature.cls} is no rotary embedding", "target it: `rotary_emb`", code="GP442")
        frequencies = signature.buffers.get(f"{self.layer_type}_inv_freq" if self.layer_type else "inv_freq")
        for name in _NEEDS["longrope"]:
            factors = getattr(self, name)
            if factors is not None and frequencies is not None and (len(factors),) != frequencies.shape:
                pairs = " x ".join(map(str, frequencies.shape))
                raise Refusal(f"`{name}` has {len(factors)} numbers for {pairs} pairs of features", code="GP564")

    def parameters(self, before: Mapping[str, Any], positions: int) -> dict[str, Any]:
        """Transformers' `rope_parameters` of one kind of layers, from those that were there."""
        kind = "dynamic" if self.kind == "ntk" else self.kind
        same = before["rope_type"] == kind
        found = {name: value for name, value in before.items() if same or name not in _OF_A_KIND}
        found |= {"rope_type": kind, "factor": self.factor}
        if "original" in _TAKES[self.kind]:
            found[ORIGINAL] = self.original or before.get(ORIGINAL) or positions
        given = {name: getattr(self, name) for name in sorted(_TAKES[self.kind] - {"original"})}
        lists = {name: list(value) for name, value in given.items() if isinstance(value, tuple)}
        return found | {name: value for name, value in given.items() if value is not None} | lists

    def after(self, target: Target) -> str:
        of = f" ({self.layer_type})" if self.layer_type else ""
        return f"{self.kind} {target.signature.cls}{of}"


def _layer_types(parameters: Any) -> list[str]:
    """The types of layers that have a set of their own; none where one set is for all."""
    if not isinstance(parameters, Mapping) or "rope_type" in parameters:
        return []
    return [name for name, value in parameters.items() if isinstance(value, Mapping)]
