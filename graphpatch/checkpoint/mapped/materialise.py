"""Memory for a model on the meta device: values from a checkpoint stand in the places of its tensors."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...lang.diagnostics import Diagnostic, Error
from ..tensors import on_meta

Place = tuple[dict[str, Any], str]
"""An entry of a module's `_parameters` or `_buffers`."""


class Places:
    """Where each tensor of a model, or of its chunks, stands."""

    def __init__(self, models: Sequence[nn.Module]):
        self._places: dict[int, list[Place]] = {}
        for module in (module for model in models for module in model.modules()):
            for held in (module._parameters, module._buffers):
                for name, tensor in held.items():
                    if tensor is not None:
                        self._places.setdefault(id(tensor), []).append((held, name))

    def put(self, before: Tensor, value: Tensor) -> None:
        """`value` takes the place of a tensor on the meta device, wherever that stands: in its dtype, with its flag and
        its attributes."""
        value = value.to(before.dtype, copy=True).contiguous()
        made: Tensor = nn.Parameter(value, before.requires_grad) if isinstance(before, nn.Parameter) else value
        made.__dict__.update(before.__dict__)
        for held, name in self._places.pop(id(before), ()):  # none left: a tied weight under another of its names
            held[name] = made


def fill_unsaved(models: Sequence[nn.Module], saved: Collection[Tensor]) -> None:
    """Give memory and values to what a checkpoint does not hold: buffers that a model computes when it is built, such
    as rotary frequencies. A model of Transformers computes them again in its `_init_weights`.

    Raises `Error` (GP616), with all as it was, where one stays without values.
    """
    known = set(map(id, saved))
    parameter = next((n for m in models for n, p in m.named_parameters() if p.is_meta and id(p) not in known), None)
    if parameter is not None:
        raise on_meta(parameter)
    before = [
        (model, path, module, {name: b for name, b in module._buffers.items() if _lacks(b, known)})
        for model in models
        for path, module in model.named_modules()
    ]
    for model, _, module, buffers in before:
        module._buffers.update({name: _unset(buffer) for name, buffer in buffers.items()})
        compute = getattr(model, "_init_weights", None)
        if buffers and compute is not None:
            with torch.no_grad():
                compute(module)
    left = next((f"{path}.{n}" for _, path, m, held in before for n, b in held.items() if _is_unset(m, n, b)), None)
    if left is not None:
        for _, _, module, buffers in before:
            module._buffers.update(buffers)
        title = f"`{left.removeprefix('.')}` is on the meta device, and a checkpoint has no values for it"
        fix = "it is computed where the model is built: build the model on the CPU, or this module of it"
        raise Error(Diagnostic("GP616", title, fixes=(fix,)))


def _lacks(buffer: Tensor | None, known: Collection[int]) -> bool:
    return buffer is not None and buffer.is_meta and id(buffer) not in known


def _is_unset(module: nn.Module, name: str, before: Tensor) -> bool:
    now = module._buffers[name]
    return now is not None and torch.equal(now.nan_to_num(1.0), _unset(before).nan_to_num(1.0))


def _unset(like: Tensor) -> Tensor:
    """Memory that shows whether somebody wrote to it."""
    if like.is_floating_point() or like.is_complex():
        return torch.full(like.shape, torch.nan, dtype=like.dtype)
    return torch.full(like.shape, 1 if like.dtype == torch.bool else torch.iinfo(like.dtype).max, dtype=like.dtype)
