"""`tap` on any module, and `taps`, which listens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple, cast

from torch import nn

from ..lang.diagnostics import ApplyError, Diagnostic
from ..ops.op import Op
from ..ops.tap import Tap
from .rewrite import InPlace

_listeners: list[dict[int, dict[str, list[Any]]]] = []
"""Of each what it has heard, by the id of a module it listens to. Not a ContextVar: torch.compile follows a list, and
the threads in which a model may compute are not those that listen."""


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
        for heard in _listeners:
            if id(self) in heard:
                for tap in self._tap:
                    heard[id(self)].setdefault(tap.name, []).append(output)
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
    seen: dict[str, list[Any]] = {}
    heard = {id(module): seen for module in tapped}
    _listeners.append(heard)
    try:
        yield seen
    finally:
        _listeners[:] = [other for other in _listeners if other is not heard]
