"""What the ops of the family `head` share: a head computes on the hidden states of a whole model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field

from ..tree.tree import Signature, Tensor
from .arguments import Count, Text
from .norm import WIDTHS
from .op import Op, Refusal, Target

Init = Literal["normal", "zeros"]
Pool = Literal["last", "mean", "cls", "max", "pooler"]

_MODEL = "transformers.modeling_utils.PreTrainedModel"
_LINEAR = "torch.nn.modules.linear.Linear"
_MEGATRON = "megatron.core.models.common.language_module.language_module.LanguageModule"
_MEGATRON_LINEAR = "megatron.core.tensor_parallel.layers.ColumnParallelLinear"
_WIDTHS = ("word_embed_proj_dim", *WIDTHS)
"""What a config calls the width of a model's last hidden states; OPT projects them first."""


class Head(Op):
    """A head on a model's last hidden states, beside what the model has.

    The rule names the model (`^`, a model of Transformers) or its output layer (`@head`); either way the head stands on
    the model that the output layer belongs to. An output layer that is named is kept, under its keys, and not called.
    """

    accepts: ClassVar = {_MODEL: "", _LINEAR: "", _MEGATRON: "", _MEGATRON_LINEAR: ""}
    at_end: ClassVar[bool] = True
    level: ClassVar[int] = 30
    on_transformers: ClassVar[str]
    """The rewrites for a model of Transformers, for any other, and for one of megatron-core; empty where there is
    none."""
    on_others: ClassVar[str] = ""
    on_megatron: ClassVar[str] = ""

    at: Text | None = Field(default=None, kw_only=True)
    """The output layer that is not called any more, by its path; filled in from the target of the rule."""
    hidden: Count | None = Field(default=None, kw_only=True)
    """Features of the last hidden states; the config's unless given."""

    def seat(self, above: Sequence[Signature]) -> int:
        kinds = {_MODEL, _MEGATRON}
        models = [number for number, signature in enumerate(above) if kinds.intersection(signature.mro)]
        # A bare encoder stands within a model with a head, and both are models: the nearest that is above the target.
        return models[-1] if models else 0

    def resolved(self, target: Target) -> Op:
        if not is_transformers(target) and not (self.on_megatron and is_megatron(target)):
            self._refuse_elsewhere(target)
        at = target.path_in_seat or self.at
        return self.model_copy(update={"at": at, "hidden": self.hidden or _width(target, self.op)})

    def through(self, target: Target, row: str) -> str:
        if is_transformers(target):
            return self.on_transformers
        return self.on_megatron if is_megatron(target) else self.on_others

    def _refuse_elsewhere(self, target: Target) -> None:
        name = target.seat.cls or "the model"
        if not self.on_others:
            raise Refusal(f"`{self.op}` stands on a model of Transformers, and {name} is none", code="GP448")
        if not target.path_in_seat:
            raise Refusal(
                f"{name} is no model of Transformers, and does not say where its hidden states are",
                "target its output layer, the last nn.Linear, and not the model",
                code="GP448",
            )

    def check(self, target: Target) -> None:
        config = target.config or {}
        if config.get("is_encoder_decoder") is True:
            raise Refusal(
                f"{target.seat.cls} is an encoder and a decoder, and `{self.op}` would not know which to read",
                "apply the rules to the encoder by itself: model.get_encoder()",
                code="GP447",
            )
        vocabulary = config.get("vocab_size")
        size = target.signature.attributes.get("out_features")
        known = isinstance(vocabulary, int) and isinstance(size, int)
        # Padded to a multiple of eight, or grown by `resize_token_embeddings`, it is still nearly as large.
        if target.path_in_seat and is_transformers(target) and known and not vocabulary / 2 <= size <= vocabulary * 2:  # type: ignore[operator]
            raise Refusal(
                f"it puts out {size} features for a vocabulary of {vocabulary}, so it is not the model's output layer",
                "target the output layer, `@head`, or the model, `^`",
                code="GP448",
            )

    def after(self, target: Target) -> str:
        return target.seat.cls


def is_transformers(target: Target) -> bool:
    """Whether the head stands on a model of Transformers."""
    return _MODEL in target.seat.mro


def is_megatron(target: Target) -> bool:
    """Whether it stands on a language model of megatron-core."""
    return _MEGATRON in target.seat.mro


def linear(name: str, inputs: int, outputs: int, bias: bool, dtype: str) -> dict[str, Tensor]:
    """The tensors of an `nn.Linear` of that name."""
    weight = {f"{name}.weight": Tensor((outputs, inputs), dtype)}
    return {**weight, f"{name}.bias": Tensor((outputs,), dtype)} if bias else weight


def _width(target: Target, op: str) -> int:
    config = dict(target.config or {})
    text = config.get("text_config")
    for table in (text if isinstance(text, dict) else {}, config):
        for name in _WIDTHS:
            if isinstance(table.get(name), int) and (is_transformers(target) or is_megatron(target)):
                return int(table[name])
    inputs = target.signature.attributes.get("in_features")
    if isinstance(inputs, int):
        return inputs
    raise Refusal(
        f"how wide the hidden states of {target.seat.cls or 'the model'} are is said by no config",
        f"say it: {op}(hidden=...)",
        code="GP449",
    )
