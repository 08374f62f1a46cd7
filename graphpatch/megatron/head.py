"""Heads on the last stage of a language model of megatron-core: every rank of tensor parallelism has them whole, and
sees all of the sequence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.head import Head
from ..ops.op import Refusal
from ..rewrites.head import OnModel
from ..rewrites.head_beside import Pooled, Projected, WithValue
from ..rewrites.head_losses import loss_of
from ..rewrites.pooling import last, pooled
from ..rewrites.rewrite import InPlace
from ..rewrites.score_layer import Scores, Scoring
from .sharding import drawn_alike, group_of


class Seen(NamedTuple):
    called: bool
    """Whether the output layer computes, too."""
    text: str = ""


class Seeing(InPlace):
    """On the output layer: the hidden states that it is given (S x B x H, under sequence parallelism the rank's part of
    S) lie on it until the model takes them off."""

    level: ClassVar[int] = Head.level
    entries: ClassVar[str] = "_seen"
    _seen: tuple[Seen, ...] = ()
    _states: Any = None

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._seen:
            self._states = input_
            if not all(one.called for one in self._seen):
                return input_, None
        return super().forward(input_, *args, **kwargs)


class OnLastStage(OnModel):
    """Reads what the output layer is given."""

    calls: ClassVar[bool] = True
    """Whether the output layer computes, too."""

    @classmethod
    def check(cls, entry: Any, module: nn.Module) -> None:
        check_model(module)

    @classmethod
    def initialise(cls, entry: Any, tensors: Mapping[str, Tensor], module: nn.Module) -> None:
        with drawn_alike(output_layer(module)):
            super().initialise(entry, tensors, module)

    @classmethod
    def companions(cls, entry: Any, module: nn.Module) -> Iterable[tuple[nn.Module, type[InPlace], Any]]:
        return [(output_layer(module), Seeing, Seen(cls.calls, "" if cls.calls else f"not called: {entry.op}"))]


class MegatronScored(OnLastStage, Scores):
    """Puts out the scores of sequences (B x labels) or tokens (B x S x labels), or given `labels` their loss, a number.

    The arguments are the model's own; `labels` are those of the head."""

    calls: ClassVar[bool] = False

    @classmethod
    def uncalled(cls, entry: Scoring, module: nn.Module) -> Iterable[nn.Module]:
        return (output_layer(module),)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self._head:
            return super().forward(*args, **kwargs)
        head, given = self._head[0].score, self.named(args, kwargs)
        labels = given.pop("labels", None)
        super().forward(**given)
        states, layer = states_of(cast(nn.Module, self)), getattr(self, head.name)
        real = real_tokens(given, states.shape[1])
        if head.pool == "none":
            logits = layer(states)
        elif head.pool == "last":
            logits = last(layer(states), real)
        else:
            logits = layer(pooled(states, real, head.pool))
        return logits if labels is None else loss_of(logits, labels, head.problem)


class MegatronValued(OnLastStage, WithValue):
    """Puts out a pair: what the model does, and a value for each token (B x S)."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        if not self._head_value:
            return output
        states = states_of(cast(nn.Module, self))
        return output, getattr(self, self._head_value[0].name)(states)


class MegatronEmbedding(OnLastStage, Projected):
    """Puts out a pair: what the model does, and a vector for each sequence (B x dim)."""

    @classmethod
    def check(cls, entry: Pooled, module: nn.Module) -> None:
        super().check(entry, module)
        if entry.pool == "pooler":
            raise Refusal("it has no pooler", 'pool="last", "mean", "max" or "cls"', code="GP450")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        if not self._head_embed:
            return output
        entry, states = self._head_embed[0], states_of(cast(nn.Module, self))
        vector = pooled(states, real_tokens(self.named(args, kwargs), states.shape[1]), entry.pool)
        if entry.dim is not None:
            vector = cast(nn.Module, self.projection)(vector)
        return output, F.normalize(vector, dim=-1) if entry.normalize else vector


def check_model(module: nn.Module) -> None:
    """Raise `Refusal` (GP467) for a model whose last hidden states are not those that its output layer is given."""
    if getattr(module, "output_layer", None) is None:
        raise Refusal("it was built without an output layer (post_process=False)", code="GP467")
    if getattr(cast(Any, module.config), "mtp_num_layers", None):
        why = "it predicts several tokens (mtp_num_layers), and gives its output layer more than the last states"
        raise Refusal(why, "build the model without mtp_num_layers", code="GP467")


def output_layer(module: nn.Module) -> nn.Module:
    return cast(nn.Module, module.output_layer)


def states_of(module: nn.Module) -> Tensor:
    """The last hidden states, B x S x H, the same on all ranks of tensor parallelism."""
    layer: Any = output_layer(module)
    states = layer.__dict__.pop("_states")
    if layer.sequence_parallel:
        from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

        # Every rank computes the same from the whole, so each has the gradient of its part already.
        states = gather_from_sequence_parallel_region(states, tensor_parallel_output_grad=False, group=group_of(layer))
    return states.transpose(0, 1).contiguous()  # type: ignore[no-any-return]


def real_tokens(given: Mapping[str, Any], length: int) -> Tensor | None:
    """Which tokens are no padding, B x S: by `padding_mask` (true for padding), else by `attention_mask` (true for what
    is not to be seen): a real token sees itself. None where neither is given, which means: all."""
    padding, hidden = given.get("padding_mask"), given.get("attention_mask")
    if isinstance(padding, Tensor):
        return ~padding
    if not isinstance(hidden, Tensor) or hidden.dim() != 4 or hidden.shape[-1] != length:
        return None
    rows = hidden[:, 0]
    return ~(rows[:, 0] if rows.shape[1] == 1 else torch.diagonal(rows, dim1=-2, dim2=-1))
