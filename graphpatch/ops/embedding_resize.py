"""More tokens than a model was made for: new rows in its embedding, and in the output layer over the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field

from ..tree.tree import Signature, Tensor
from .arguments import Count, Text
from .op import Op, Refusal, Target
from .registry import register

Init = Literal["mean", "zeros", "normal"]
Train = Literal["new", "all", "none"]


class MoreTokens(Op):
    accepts: ClassVar = {"torch.nn.modules.sparse.Embedding": "graphpatch.rewrites.embedding_resize:MoreTokens"}
    level: ClassVar[int] = 12

    init: Init = Field(default="mean", kw_only=True)
    """`mean` of the rows that are there (Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language
    Models", without its noise), `zeros`, or `normal` with the config's `initializer_range`, else 0.02."""
    train: Train = Field(default="new", kw_only=True)
    """`new`: the new rows train and those of the base stand still; `all`: both train; `none`: neither does. What
    `freeze` and `train` statements say afterwards wins."""
    head: Text | None = Field(default=None, kw_only=True)
    """The path, below the model, of an output layer with a weight of its own, which gains rows too; "none" where no
    output layer shall. One that is tied to the embedding follows it without being named."""
    embedding: Text | None = Field(default=None, kw_only=True)
    """The path of the embedding below the model; filled in from the target of the rule."""

    def more(self, rows: int) -> int:
        """How many rows are new, where there are `rows`. Raises `Refusal` (GP480)."""
        raise NotImplementedError

    def slots(self) -> frozenset[str]:
        return frozenset({"embedding.resize"})

    def seat(self, above: Sequence[Signature]) -> int:
        # The outermost, since the output layer is a part of that; what stands around a model has no config.
        return next((number for number, signature in enumerate(above[:-1]) if signature.config >= 0), 0)

    def resolved(self, target: Target) -> Op:
        return self.model_copy(update={"embedding": target.path_in_seat})

    def check(self, target: Target) -> None:
        weight = target.signature.parameters.get("weight")
        if weight is None or len(weight.shape) != 2:
            raise Refusal(f"{target.signature.cls} has no weight of tokens x features", code="GP480")
        self.more(weight.shape[0])
        attributes = target.signature.attributes
        for name in ("max_norm", "scale_grad_by_freq"):
            if attributes.get(name):
                raise Refusal(f"what `{name}` does to a row counts all rows, and the new ones lie apart", code="GP480")
        own = target.path.removesuffix(target.path_in_seat or "")
        for path in target.tied.get("weight", ()):
            if not path.startswith(own):
                raise Refusal(f"its weight is `{path}` too, outside of the model that it belongs to", code="GP480")
        if self.head not in (None, "none") and self._tied_to(target, str(self.head)):
            raise Refusal(f"`{self.head}` is tied to it and follows by itself", "leave `head` out", code="GP481")

    def _tied_to(self, target: Target, path: str) -> bool:
        return any(f".{tied}".endswith(f".{path}.weight") for tied in target.tied.get("weight", ()))

    def repeats(self, other: Op, target: Target) -> bool:
        return isinstance(other, MoreTokens) and self._tied_to(target, str(other.embedding))

    def adds(self, target: Target) -> dict[str, Tensor]:
        weight = target.signature.parameters["weight"]
        rows = Tensor((self.more(weight.shape[0]), weight.shape[1]), weight.dtype, trainable=self.train != "none")
        named = self.head not in (None, "none")
        return {"new_tokens.weight": rows, **({"new_tokens.head_weight": rows} if named else {})}

    def after(self, target: Target) -> str:
        return f"{target.seat.cls} of more tokens"


@register("embedding.resize")
class EmbeddingResize(MoreTokens):
    """The embedding has `len` rows: those that it has, and new ones for the tokens after them.

    The new rows are a parameter of their own, `new_tokens.weight` of the model, so that the rows of the base stay the
    parameter that they are: base checkpoints load before and after, an adapter holds the new rows alone, and those
    train without the others. A token's number says where it is looked up. An output layer that is tied to the
    embedding has a logit for each new token, from the same new rows, and stays tied; one with a weight of its own must
    be named, `head="lm_head"`, and gains rows of its own, `new_tokens.head_weight`. Where it has a bias, a new token's
    is the mean of the others'. `config.vocab_size`, `num_embeddings` and `out_features` are the new ones.

    Adapters on the embedding and its output layer add to the rows of the base; the new rows train whole.
    Transformers' `resize_token_embeddings` computes the same with one longer weight.
    """

    length: Count = Field(alias="len")
    """Rows in all."""

    def more(self, rows: int) -> int:
        if self.length <= rows:
            what = "has as many rows already" if self.length == rows else "can gain rows, and not lose any"
            raise Refusal(f"the embedding, of {rows}, {what}", f"give a `len` above {rows}", code="GP480")
        return self.length - rows


@register("embedding.extend")
class EmbeddingExtend(MoreTokens):
    """The embedding has `count` rows more: `embedding.resize`, by how much and not to how many."""

    count: Count

    def more(self, rows: int) -> int:
        return self.count
