"""Heads that score, on models of Transformers: the outputs and losses are those of its own classes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any, ClassVar, cast

from torch import Tensor, nn

# Named only by tables, for models of Transformers; whoever has such a model has the package.
from transformers.modeling_outputs import (
    SequenceClassifierOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)

from ..lang.diagnostics import ApplyError, Diagnostic
from ..ops.op import Refusal
from .head import OnModel, check_output_layer, no_generation
from .head_losses import loss_of
from .pooling import last, pooled, real_tokens
from .rewrite import InPlace
from .score_layer import Scores, Scoring


class OnTransformers(OnModel):
    """Reads the last hidden states of the model's body, which is called past the output layer."""

    def body(self, given: Mapping[str, Any]) -> Any:
        """The output of the model without its head, for the arguments of a call."""
        base = body_of(self)
        call = super().forward if base is self else base
        return call(**{k: v for k, v in given.items() if k not in _OF_THE_HEAD}, return_dict=True)

    def real_tokens(self, given: Mapping[str, Any], states: Tensor) -> Tensor | None:
        """B x S; None means all. Raises `ApplyError` (GP571) where nothing tells and there may be padding."""
        config = cast(Any, self.config).get_text_config()
        pad = getattr(config, "pad_token_id", None)
        ids, mask = given.get("input_ids"), given.get("attention_mask")
        real = real_tokens(mask, ids, pad, states.shape[1])
        if real is None and states.shape[0] > 1 and ids is not None:
            raise ApplyError(
                Diagnostic(
                    "GP571",
                    "which tokens of a batch are padding is said neither by attention_mask nor by config.pad_token_id",
                    fixes=("give attention_mask, as the tokenizer returns it", "or set model.config.pad_token_id"),
                )
            )
        return real


def body_of(model: nn.Module) -> nn.Module:
    """The model without its head, itself where it has none. Transformers' `base_model`, but for Llama 4, whose is the
    model with the head."""
    body = cast(nn.Module, model.base_model)
    inner = [child for child in model.children() if hasattr(child, "base_model")]
    headed = body is model and model.get_output_embeddings() is not None  # type: ignore[operator]
    return inner[0] if headed and len(inner) == 1 else body


_OF_THE_HEAD = {"labels", "logits_to_keep", "num_items_in_batch", "return_dict", "shift_labels"}
"""Arguments that a model with a head takes, and that its body does not."""


def check_pooler(pool: str, module: nn.Module) -> None:
    """Raise `Refusal` (GP575) where a pooler is to be read that the model has not."""
    body = body_of(module)
    if pool == "pooler" and getattr(body, "pooler", None) is None:
        raise Refusal(
            f"{type(body).__name__} was built without a pooler",
            "build it with one: AutoModel.from_pretrained(...), and target the model, `^`",
            code="GP575",
        )


class Scored(Scores, OnTransformers):
    """Scores sequences or tokens, in the place of what the model's own head does."""

    takes: ClassVar[tuple[str, ...]] = ("labels",)
    accepts_loss_kwargs: ClassVar[bool] = False
    """The losses are means over a batch, so a Trainer that accumulates gradients must divide by their number."""

    @classmethod
    def variant(cls, below: Any) -> type[InPlace]:
        made = super().variant(below)
        return type(cls.__name__, (_NotGenerating, made), {"__module__": cls.__module__}) if _generates(below) else made

    @classmethod
    def check(cls, entry: Scoring, module: nn.Module) -> None:
        check_output_layer(module, entry.at)
        check_pooler(entry.score.pool, module)

    @classmethod
    def uncalled(cls, entry: Scoring, module: nn.Module) -> Iterable[nn.Module]:
        layer = module.get_output_embeddings()  # type: ignore[operator]
        return () if layer is None else (layer,)

    @classmethod
    def config_values(cls, entry: Scoring, module: nn.Module) -> Mapping[str, Any]:
        names = entry.score.names
        problem = None if entry.score.problem == "tokens" else entry.score.problem
        return {
            "id2label": dict(enumerate(names)),
            "label2id": {name: number for number, name in enumerate(names)},
            "problem_type": problem,
        }

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self._head:
            return super().forward(*args, **kwargs)
        head = self._head[0].score
        given = self.named(args, kwargs)
        output = self.body(given)
        states, layer = output.last_hidden_state, getattr(self, head.name)
        if head.pool == "none":
            logits = layer(states)
        elif head.pool == "pooler":
            logits = layer(output.pooler_output)
        else:
            real = self.real_tokens(given, states)
            # As Transformers does, the scores of all tokens first; a mean of the states is the cheaper one.
            logits = last(layer(states), real) if head.pool == "last" else layer(pooled(states, real, head.pool))
        labels = given.get("labels")
        loss = None if labels is None else loss_of(logits, labels, head.problem)
        result = _output(head.pool, output, loss, logits)
        as_tuple = given.get("return_dict") is False or cast(Any, self.config).return_dict is False
        return result.to_tuple() if as_tuple else result


class _NotGenerating:
    """In front of a model that generates."""

    _head: tuple[Scoring, ...]

    def can_generate(self) -> bool:
        return not self._head and super().can_generate()  # type: ignore[misc, no-any-return]

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        if self._head:
            raise no_generation(cast(nn.Module, self), self._head[0].op)
        return super().generate(*args, **kwargs)  # type: ignore[misc]


def _generates(below: Any) -> bool:
    return hasattr(below, "generate")


_CARRIED = {
    cls: tuple(f.name for f in fields(cls) if f.name not in ("loss", "logits"))
    for cls in (SequenceClassifierOutput, SequenceClassifierOutputWithPast, TokenClassifierOutput)
}


def _output(pool: str, body: Any, loss: Tensor | None, logits: Tensor) -> Any:
    decodes = pool == "last" or any(body.get(name) is not None for name in ("cache", "past_key_values"))
    cls = (
        TokenClassifierOutput
        if pool == "none"
        else SequenceClassifierOutputWithPast
        if decodes
        else SequenceClassifierOutput
    )
    return cls(loss=loss, logits=logits, **{name: body.get(name) for name in _CARRIED[cls]})
