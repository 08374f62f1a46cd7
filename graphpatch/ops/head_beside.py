"""Heads beside what a model puts out: a value for each token, or an embedding of each sequence."""

from __future__ import annotations

from typing import ClassVar, Literal

from ..tree.tree import Tensor
from .arguments import Count, Flag, Share, Text
from .head import Head, Init, linear
from .op import Op, Refusal, Target
from .registry import register


class Beside(Head):
    """A head whose output stands beside those of the model, which stay."""

    def resolved(self, target: Target) -> Op:
        if target.path_in_seat:
            raise Refusal(
                f"`{self.op}` stands beside what the model puts out, and `{target.path_in_seat}` stays",
                "target the model: patch ^",
                code="GP448",
            )
        return super().resolved(target)


@register("head.value")
class Value(Beside):
    """A value for each token beside the language-model head: value = summary(dropout(h)), B x S, as PPO trains it.

    The model's output stays what it is and gains `value`, in float32: `output.value`, or `output["value"]`. The layer
    is `v_head.summary` with a bias, which are the keys that TRL's `AutoModelForCausalLMWithValueHead` has, with its
    dropout of 0.1 and its computing in float32; that puts out a tuple `(logits, loss, value)`, which here is
    `(output.logits, output.loss, output.value)`. A model of megatron-core carries the head on its last stage, and puts
    out a pair: what it did before, and the values. Schulman et al., arXiv:1707.06347; Ziegler et al., arXiv:1909.08593.
    """

    on_transformers: ClassVar[str] = "graphpatch.rewrites.head_beside:Valued"
    on_megatron: ClassVar[str] = "graphpatch.megatron.head:MegatronValued"

    name: Text = "v_head"
    dropout: Share = 0.1
    init: Init = "normal"

    def adds(self, target: Target) -> dict[str, Tensor]:
        assert self.hidden is not None
        return linear(f"{self.name}.summary", self.hidden, 1, True, target.dtype)

    def after(self, target: Target) -> str:
        return f"{target.seat.cls} + {self.name} ({self.hidden} -> 1)"


@register("head.embed")
class Embed(Beside):
    """One vector for each sequence: normalize(projection(pool(h))), with h the last hidden states (B x S x H).

    The model's output gains `sentence_embedding` (B x dim), and keeps what it has. Without `dim`, or with the model's
    own width, there is no projection and nothing to train; else a linear layer `projection` without bias. `pool` is
    that of `head.classify`; a mean over the real tokens, normalised to length one, is what sentence-transformers makes
    of its encoders (Reimers and Gurevych, arXiv:1908.10084). A model of megatron-core puts out a pair: what it did
    before, and the vectors.
    """

    on_transformers: ClassVar[str] = "graphpatch.rewrites.head_beside:Embedding"
    on_megatron: ClassVar[str] = "graphpatch.megatron.head:MegatronEmbedding"

    dim: Count | None = None
    pool: Literal["last", "mean", "cls", "max", "pooler"] = "mean"
    normalize: Flag = True

    @property
    def projects(self) -> bool:
        return self.dim is not None and self.dim != self.hidden

    def adds(self, target: Target) -> dict[str, Tensor]:
        assert self.hidden is not None
        if self.dim is None or not self.projects:
            return {}
        return linear("projection", self.hidden, self.dim, False, target.dtype)

    def after(self, target: Target) -> str:
        return f"{target.seat.cls} + sentence embedding ({self.dim or self.hidden})"
