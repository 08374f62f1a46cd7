"""How far attention looks."""

from __future__ import annotations

from typing import ClassVar

from .arguments import Count, Flag
from .attention import AttentionOp, known
from .op import Refusal, Target
from .registry import register


@register("attention.window")
class AttentionWindow(AttentionOp):
    """Each position sees those less than `size` away: with a causal mask the last `size`, itself included, as
    Transformers counts `sliding_window` (Beltagy et al., arXiv:2004.05150, section 3.1). Masks and padding that are
    there stay. `none` is no window: what a rule says of the layers between, `$size if $i % 2 == 0 else none`.
    """

    word: ClassVar[str] = "windowed"

    size: Count | None

    def after(self, target: Target) -> str:
        return super().after(target) if self.size is not None else target.signature.cls

    def check(self, target: Target) -> None:
        super().check(target)
        there = target.signature.attributes.get("sliding_window")
        if isinstance(there, int) and (self.size is None or self.size > there):
            raise Refusal(
                f"{target.signature.cls} has a window of {there} itself, and its mask does not say what lies beyond",
                "set the model's own window: its config's sliding_window and layer_types",
                code="GP466",
            )


@register("attention.causal")
class AttentionCausal(AttentionOp):
    """Whether a position is kept from seeing later ones. `true` puts that into the mask, `false` takes it out; padding
    stays masked. An encoder from a decoder: BehnamGhader et al., LLM2Vec, arXiv:2404.05961, section 2.
    """

    word: ClassVar[str] = "masked"

    causal: Flag

    def check(self, target: Target) -> None:
        super().check(target)
        if not self.causal and known(target, "sliding_window") is not None:
            raise Refusal(
                f"{target.signature.cls} has a sliding window, and its mask does not say what lies beyond",
                code="GP466",
            )
