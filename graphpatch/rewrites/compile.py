"""`compile` on any module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import nn

from ..ops.compile import Compile
from ..ops.op import Op, Refusal
from .rewrite import InPlace


class How(NamedTuple):
    backend: str
    mode: str | None
    fullgraph: bool
    dynamic: bool | None
    text: str


class Compiled(InPlace):
    """Runs what was compiled of all that stands below."""

    level: ClassVar[int] = Compile.level
    entries: ClassVar[str] = "_compile"
    _compile: tuple[How, ...] = ()

    @classmethod
    def entry(cls, op: Op, parameter: str | None = None) -> How:
        how = cast(Compile, op)
        return How(how.backend, how.mode, how.fullgraph, how.dynamic, how.text())

    @classmethod
    def check(cls, entry: How, module: nn.Module) -> None:
        known = torch.compiler.list_backends(exclude_tags=())
        if entry.backend not in known:
            raise Refusal(f"no backend is called `{entry.backend}`", f"there are {', '.join(known)}", code="GP583")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        below: Any = super().forward
        if not self._compile or torch.compiler.is_compiling():
            return below(*args, **kwargs)
        return _compiled(below.__func__, self._compile[-1])(self, *args, **kwargs)


def _compiled(forward: Callable[..., Any], how: How) -> Callable[..., Any]:
    """The compiled function, which takes the module as its first argument, and so serves all of a class."""
    key = (forward, how[:-1])
    if key not in _made:
        _made[key] = torch.compile(
            forward, backend=how.backend, mode=how.mode, fullgraph=how.fullgraph, dynamic=how.dynamic
        )
    return _made[key]


_made: dict[tuple[Any, ...], Callable[..., Any]] = {}
