"""Heads that predict the tokens after the next."""

from __future__ import annotations

from typing import ClassVar

from ..tree.tree import Tensor
from .arguments import Count, Real
from .head import linear
from .head_beside import Beside
from .op import Refusal, Target
from .registry import register


@register("head.medusa")
class Medusa(Beside):
    """`n` heads beside the language-model head, of which the k-th predicts the token k after the next one.

    logits_k = W2 (h + SiLU(W1 h + b)), with W1 and b zero and W2 a copy of the language-model head at first, so that
    each head starts as that (Cai et al., arXiv:2401.10774, section 2.1.1). The output gains `medusa_logits`,
    n x B x S x V. With `labels=` the loss gains the sum of decay^k * cross entropy of the k-th head (section 2.2.1);
    with the base frozen this trains the heads alone, as Medusa-1 does. Keys are `medusa_head.0.0.linear.weight`,
    `.bias` and `medusa_head.0.1.weight`, and so on, as in the paper's own code.
    """

    on_transformers: ClassVar[str] = "graphpatch.rewrites.head_medusa:Medusas"

    n: Count = 5
    decay: Real = 0.8

    def _vocabulary(self, target: Target) -> int:
        size = (target.config or {}).get("vocab_size")
        if not isinstance(size, int):
            raise Refusal("the config around says no vocab_size", code="GP449")
        return size

    def adds(self, target: Target) -> dict[str, Tensor]:
        assert self.hidden is not None
        words, found = self._vocabulary(target), dict[str, Tensor]()
        for k in range(self.n):
            found |= linear(f"medusa_head.{k}.0.linear", self.hidden, self.hidden, True, target.dtype)
            found |= linear(f"medusa_head.{k}.1", self.hidden, words, False, target.dtype)
        return found

    def after(self, target: Target) -> str:
        return f"{target.seat.cls} + {self.n} Medusa heads"
