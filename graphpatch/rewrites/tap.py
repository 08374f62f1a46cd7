"""`tap` on any module, and `taps`, which listens."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar, NamedTuple, cast

from torch import nn

from ..lang.diagnostics import ApplyError, Diagnostic
from ..ops.op import Op
from ..ops.tap import Tap
from .rewrite import InPlace

_listeners: ContextVar[tuple[tuple[frozenset[int], dict[str, list[Any]]], ...]] = ContextVar("taps", default=())


class Named(NamedTuple):
    name: str
    text: str


class Tapped(InPlace):
    """Tells those who listen."""

    level: ClassVar[int] = Tap.level
    entries: ClassVar[str] = "_tap"
    _tap: tuple[Named, ...] = ()

    @classmethod
    def entry(cls, op: Op, parameter: str | None = None) -> Named:
        return Named(cast(Tap, op).name, op.text())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        for modules, seen in _listeners.get():
            if id(self) in modules:
                for tap in self._tap:
                    seen[tap.name].append(output)
        return output


@contextmanager
def taps(model: nn.Module) -> Iterator[dict[str, list[Any]]]:
    """Within, what the tapped modules of `model` put out, by the names of their taps: a list each, in order of calls.

    Raises `ApplyError` (GP566) where no module of it is tapped.
    """
    tapped = [module for module in model.modules() if getattr(module, "_tap", ())]
    if not tapped:
        fix = 'graphpatch.apply(model, graphpatch.parse("patch layers[*].mlp with tap(\\"h\\")"))'
        raise ApplyError(Diagnostic("GP566", "no module of this model is tapped", fixes=(fix,)))
    seen: dict[str, list[Any]] = defaultdict(list)
    token = _listeners.set((*_listeners.get(), (frozenset(map(id, tapped)), seen)))
    try:
        yield seen
    finally:
        _listeners.reset(token)
        seen.default_factory = None  # type: ignore[attr-defined]
