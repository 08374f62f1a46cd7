"""Run a model once to see which rewrites are reached."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .run import as_it_was, call, eagerly
from .subclass import set_class


def silent_modules(model: nn.Module, batch: Any, targets: Sequence[tuple[nn.Module, str]]) -> list[str]:
    """The paths of those targets whose class's `forward` was not called.

    A hook would also count a call that an instance's own `forward` then answers, so each target gets a class of its own
    for the run.
    """
    called: set[int] = set()
    with as_it_was(model), torch.no_grad(), eagerly():
        classes = [(module, type(module)) for module, _ in targets]
        try:
            for module, cls in classes:
                set_class(module, _listening(cls, called))
            call(model, batch)
        finally:
            for module, cls in classes:
                set_class(module, cls)
    return [path for module, path in targets if id(module) not in called]


def _listening(cls: Any, called: set[int]) -> type:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        called.add(id(self))
        return cls.forward(self, *args, **kwargs)

    return type(cls)(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__})
