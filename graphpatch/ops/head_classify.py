"""Heads that classify, regress or reward: one vector of scores for each sequence, or for each token."""

from __future__ import annotations

from typing import ClassVar, Literal, NamedTuple

from pydantic import model_validator

from ..tree.tree import Tensor
from .arguments import Count, Flag, Share, Text
from .head import Head, Init, Pool, is_transformers, linear
from .op import Refusal, Target
from .registry import register

Problem = Literal["single_label_classification", "multi_label_classification", "regression"]


class Score(NamedTuple):
    """What a linear layer computes of each sequence or token."""

    names: tuple[str, ...]
    """Of its outputs."""
    pool: str
    """`none`: of each token."""
    problem: str | None = None
    dropout: float = 0.0
    bias: bool = False
    init: str = "normal"
    name: str = "score"
    """Of the layer."""


class ScoreHead(Head):
    """A linear layer that scores each sequence or token."""

    on_transformers: ClassVar[str] = "graphpatch.rewrites.head_transformers:Scored"
    on_others: ClassVar[str] = "graphpatch.rewrites.head_plain:PlainScored"
    on_megatron: ClassVar[str] = "graphpatch.megatron.head:MegatronScored"
    idles: ClassVar[bool] = True

    @property
    def score(self) -> Score:
        raise NotImplementedError

    def slots(self) -> frozenset[str]:
        # The model's own output is not computed any more, so nothing can stand beside it.
        return frozenset({"head", "head.value", "head.embed", "head.medusa"})

    def check(self, target: Target) -> None:
        super().check(target)
        if self.score.pool == "pooler" and not is_transformers(target):
            fix = 'pool="cls", "mean", "max" or "last"'
            raise Refusal(f"{target.seat.cls} is no model of Transformers, and has no pooler", fix, code="GP450")

    def adds(self, target: Target) -> dict[str, Tensor]:
        assert self.hidden is not None
        return linear(self.score.name, self.hidden, len(self.score.names), self.score.bias, target.dtype)

    def after(self, target: Target) -> str:
        gone = f", {self.at} not called" if self.at else ""
        return f"{target.seat.cls} + {self.score.name} ({self.hidden} -> {len(self.score.names)}){gone}"


def _names(labels: int | tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"LABEL_{n}" for n in range(labels)) if isinstance(labels, int) else labels


@register("head.classify")
class Classify(ScoreHead):
    """Scores for each sequence: logits = score(dropout(pool(h))), with h the last hidden states (B x S x H).

    `score` is a new linear layer of the model, so that the state dict gains `score.weight`, as in Transformers'
    `*ForSequenceClassification` (of BERT's family it is called `classifier` there: `name="classifier", bias=true`). The
    output layer that it stands for stays, with its keys, and is not called; where it is tied to the embeddings, these
    stay as they are. `generate` says so.

    `labels` is how many there are, or a list of their names. `pool`: `last`, the last real token, `mean` and `max` over
    the real tokens, `cls`, the first real one, `pooler`, what the model's own pooler makes of it (BERT's). Which tokens
    are real says `attention_mask`, else `pad_token_id`; padding may be left or right.

    The model puts out a `SequenceClassifierOutput`, with a loss if given `labels`: cross entropy for
    `single_label_classification`, binary cross entropy for `multi_label_classification`, mean squared error for
    `regression`; unless `problem` says which, one label is regression, whole numbers are single labels, and others
    multiple ones, as in Transformers. `config.num_labels`, `id2label` and `problem_type` say so too.

    A model of megatron-core carries the head on its last stage, and puts out the logits, or given `labels` the loss.
    Any other model puts out the logits, a tensor, and its loss is its own affair.
    """

    labels: Count | tuple[Text, ...]
    pool: Pool = "last"
    dropout: Share = 0.0
    problem: Problem | None = None
    bias: Flag = False
    init: Init = "normal"
    """Of the weight: a normal distribution of the config's `initializer_range`, or 0.02. A bias starts at zero."""
    name: Text = "score"

    @model_validator(mode="after")
    def _makes_sense(self) -> Classify:
        if isinstance(self.labels, tuple) and len(set(self.labels)) < max(1, len(self.labels)):
            raise ValueError("the names of labels must differ, and there must be one")
        if self.problem == "single_label_classification" and len(_names(self.labels)) == 1:
            raise ValueError('one label is always right: labels=2, or problem="multi_label_classification"')
        return self

    @property
    def score(self) -> Score:
        return Score(
            _names(self.labels), self.pool, self.problem, self.dropout, self.bias, self.init, self.name
        )  # fmt: skip


@register("head.token_classify")
class TokenClassify(ScoreHead):
    """Scores for each token: logits = score(dropout(h)), B x S x labels, as Transformers' `*ForTokenClassification`.

    `labels` is how many there are, or a list of their names. With `labels=` the model computes the cross entropy, -100
    meaning no label. Otherwise as `head.classify`.
    """

    labels: Count | tuple[Text, ...]
    dropout: Share = 0.0
    bias: Flag = True
    init: Init = "normal"
    name: Text = "score"

    @property
    def score(self) -> Score:
        return Score(_names(self.labels), "none", "tokens", self.dropout, self.bias, self.init, self.name)


@register("head.regress")
class Regress(ScoreHead):
    """`dim` numbers for each sequence, trained by the mean squared error: `head.classify` of that problem."""

    dim: Count = 1
    pool: Pool = "last"
    dropout: Share = 0.0
    bias: Flag = False
    init: Init = "normal"
    name: Text = "score"

    @property
    def score(self) -> Score:
        return Score(_names(self.dim), self.pool, "regression", self.dropout, self.bias, self.init, self.name)


@register("head.reward")
class Reward(ScoreHead):
    """One number for each sequence, at its last real token: what TRL's `RewardTrainer` reads as `logits` (B x 1).

    The same as a `*ForSequenceClassification` of Transformers with `num_labels=1`, under the same key, `score.weight`.
    Stiennon et al., arXiv:2009.01325, section 3.4, put such a head on a language model; the loss of pairs is the
    trainer's.
    """

    init: Init = "normal"
    name: Text = "score"

    @property
    def score(self) -> Score:
        return Score(_names(1), "last", "regression", init=self.init, name=self.name)
