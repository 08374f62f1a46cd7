"""Run a model once to see which rewrites are reached."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .subclass import set_class


def silent_modules(model: nn.Module, batch: Any, targets: Sequence[tuple[nn.Module, str]]) -> list[str]:
    """The paths of those targets whose class's `forward` was not called.

    A hook would also count a call that an instance's own `forward` then answers, so each target gets a class of its own
    for the run.
    """
    called: set[int] = set()
    with _as_it_was(model), torch.no_grad(), _eagerly():
        classes = [(module, type(module)) for module, _ in targets]
        try:
            for module, cls in classes:
                set_class(module, _listening(cls, called))
            _call(model, batch)
        finally:
            for module, cls in classes:
                set_class(module, cls)
    return [path for module, path in targets if id(module) not in called]


def _listening(cls: Any, called: set[int]) -> type:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        called.add(id(self))
        return cls.forward(self, *args, **kwargs)

    return type(cls)(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__})


def _call(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, (tuple, list)):
        model(*batch)
    else:
        model(batch)


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; modes, buffers and the random state are put back."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer._version, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=sorted(devices, key=str)):
            for module, _ in modes:
                module.training = False
            yield
    finally:
        for module, training in modes:
            module.training = training
        for module, name, buffer, version, copy in buffers:
            module._buffers[name] = buffer
            if buffer._version != version:
                with torch.no_grad():
                    buffer.copy_(copy)


@contextmanager
def _eagerly() -> Iterator[None]:
    """A compiled model runs its Python: what is traced is not called."""
    with torch.compiler.set_stance("force_eager"):
        yield
