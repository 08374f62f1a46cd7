"""What a model's config says of it, changed along with the model."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..tree.tree import Mark


@dataclass(eq=False)
class ConfigChange:
    """A copy of the config, with other values, on the model and all below it that have the same one.

    A copy, since two models may be built of one config. What others write to it meanwhile
    (`set_attn_implementation`) is there afterwards too.
    """

    mark: Mark
    model: nn.Module
    values: Mapping[str, Any]
    original: Any = None
    changed: Any = None
    before: dict[str, Any] = field(default_factory=dict)
    nodes: list[int] = field(default_factory=list)
    modules: list[nn.Module] = field(default_factory=list)
    """None carries the mark: the change that this one comes along with has its own."""

    def do(self) -> None:
        self.original = self.model.__dict__.get("config")
        if self.original is None or not self.values:
            return
        self.changed = copy.copy(self.original)
        for name, value in self.values.items():
            setattr(self.changed, name, value)
        self.before = dict(self.changed.__dict__)
        self._put(self.original, self.changed)

    def undo(self) -> None:
        if self.changed is None:
            return
        now, before = self.changed.__dict__, self.before
        for name in now.keys() | before.keys():
            if name not in now:
                self.original.__dict__.pop(name, None)
            elif name not in before or now[name] is not before[name]:
                self.original.__dict__[name] = now[name]
        self._put(self.changed, self.original)

    def _put(self, out: Any, into: Any) -> None:
        for module in self.model.modules():
            if module.__dict__.get("config") is out:
                module.__dict__["config"] = into

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        try:
            if self.changed is not None:
                self._put(self.changed, self.original)
            yield
        finally:
            if self.changed is not None:
                self._put(self.original, self.changed)
