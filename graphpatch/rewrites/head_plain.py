"""Heads that score, on models that are not of Transformers: the output layer lets its input through, and what the model
puts out then is scored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, NamedTuple, cast

from torch import Tensor, nn

from ..lang.diagnostics import ApplyError, Diagnostic
from ..ops.head_classify import ScoreHead
from .head import layer_at
from .outputs import on_first
from .pooling import pooled, real_tokens
from .rewrite import InPlace
from .score_layer import Scores, Scoring


class Through(NamedTuple):
    text: str


class LetThrough(InPlace):
    """On the output layer: its input is its output, and lies on it until the model takes it off."""

    level: ClassVar[int] = ScoreHead.level
    entries: ClassVar[str] = "_let_through"
    _let_through: tuple[Through, ...] = ()
    _let_by: Any = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self._let_through:
            return super().forward(*args, **kwargs)
        self._let_by = args[0] if args else kwargs["input"]
        return self._let_by


class PlainScored(Scores):
    """On the model: the input of its output layer, which it puts out, is pooled over dimension 1 and scored."""

    @classmethod
    def check(cls, entry: Scoring, module: nn.Module) -> None:
        _let_by(entry, module)

    @classmethod
    def companions(cls, entry: Scoring, module: nn.Module) -> Iterable[tuple[nn.Module, type[InPlace], Any]]:
        return [(_let_by(entry, module), LetThrough, Through(f"not called: {entry.op}"))]

    @classmethod
    def uncalled(cls, entry: Scoring, module: nn.Module) -> Iterable[nn.Module]:
        return (_let_by(entry, module),)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        if not self._head:
            return output
        head, at = self._head[0].score, self._head[0].at
        given, layer = self.named(args, kwargs), _let_by(self._head[0], cast(nn.Module, self))
        let_by = layer.__dict__.pop("_let_by", None)
        first = output[0] if isinstance(output, (tuple, list)) and output else output
        if let_by is None or first is not let_by:
            raise ApplyError(
                Diagnostic(
                    "GP573",
                    f"{type(self).__name__} does not put out what `{at}` puts out, so {self._head[0].op} cannot stand "
                    "in its place",
                    text=("it changes it, adds to it, or never calls it",),
                    fixes=("call the constructor with another head, or score the hidden states yourself",),
                )
            )

        def scored(states: Tensor) -> Tensor:
            score = getattr(self, head.name)
            if head.pool == "none":
                return score(states)  # type: ignore[no-any-return]
            if states.dim() == 2:  # one state a sequence: the model pools itself
                return score(states)  # type: ignore[no-any-return]
            real = real_tokens(_mask(given), None, None, states.shape[1])
            return score(pooled(states, real, head.pool))  # type: ignore[no-any-return]

        return on_first(output, scored, self._head[0].op)


def _let_by(entry: Scoring, module: nn.Module) -> nn.Module:
    """The output layer, without which no plan puts a head on such a model."""
    assert entry.at is not None
    return layer_at(module, entry.at)


def _mask(given: Mapping[str, Any]) -> Any:
    """Of an argument that is called like one: `attention_mask` is true for real tokens, `src_key_padding_mask`, as
    PyTorch has it, for padding."""
    if isinstance(given.get("attention_mask"), Tensor):
        return given["attention_mask"]
    padding = next((given[n] for n in _PADDING if isinstance(given.get(n), Tensor)), None)
    return None if padding is None else padding == 0 if padding.dtype.is_floating_point else ~padding.bool()


_PADDING = ("src_key_padding_mask", "key_padding_mask", "padding_mask")
