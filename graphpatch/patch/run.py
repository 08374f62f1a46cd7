"""Run a model to look at it, and leave it as it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def call(model: nn.Module, batch: Any) -> None:
    """A dict is keyword arguments, a tuple or list positional ones, anything else the only one."""
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, (tuple, list)):
        model(*batch)
    else:
        model(batch)


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
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
def eagerly() -> Iterator[None]:
    """A compiled model runs its Python: what is traced is not called."""
    with torch.compiler.set_stance("force_eager"):
        yield
