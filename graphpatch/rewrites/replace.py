"""`replace` on any module."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from ..ops.op import Op
from ..ops.replace import Build
from .rewrite import Replacement


class Replaced(Replacement):
    """A new module that keeps the old one's parameters where they fit."""

    @staticmethod
    def imports(op: Op) -> str | None:
        return cast(Build, op).class_

    @staticmethod
    def build(op: Op, cls: Any, module: nn.Module, device: torch.device) -> nn.Module:
        with torch.device(device):
            new = cls(**cast(Build, op).options)
        if isinstance(new, nn.Module):
            adopt(new, module)
            cast_new(new, module)
            new.train(module.training)
        return new


def adopt(new: nn.Module, old: nn.Module) -> None:
    """Give `new` the very parameters of `old` that stand under the same name in the same shape, so that ties and the
    optimizer hold, and copies of its persistent buffers: a buffer is written by forward, and the old module must stay
    as it is for the day it comes back."""
    parameters = dict(old.named_parameters(remove_duplicate=False))
    buffers = {name: b for name, b in old.state_dict(keep_vars=True).items() if name not in parameters}
    for prefix, inner in new.named_modules():
        dot = f"{prefix}." if prefix else ""
        for name, mine in inner._parameters.items():
            theirs = parameters.get(dot + name)
            if mine is not None and theirs is not None and mine.shape == theirs.shape:
                inner._parameters[name] = theirs
        for name, held in inner._buffers.items():
            source = buffers.get(dot + name)
            persistent = name not in inner._non_persistent_buffers_set
            if persistent and held is not None and isinstance(source, Tensor) and held.shape == source.shape:
                inner._buffers[name] = source.detach().clone()


def cast_new(new: nn.Module, old: nn.Module) -> None:
    """Put the floating-point parameters that `new` brought along into the dtype of `old`'s, if that has one."""
    theirs = {id(p) for p in old.parameters()}
    dtypes = {p.dtype for p in old.parameters() if p.is_floating_point()}
    if len(dtypes) != 1:
        return
    (dtype,) = dtypes
    for parameter in new.parameters():
        if id(parameter) not in theirs and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
