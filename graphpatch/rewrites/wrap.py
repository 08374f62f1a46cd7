"""`wrap` on any module."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from ..ops.op import Op
from ..ops.replace import Build
from .replace import Replaced, cast_new


class Wrapped(Replaced):
    """A new module around the old one, which stays as it is."""

    @staticmethod
    def build(op: Op, cls: Any, module: nn.Module, device: torch.device) -> nn.Module:
        with torch.device(device):
            new = cls(module, **cast(Build, op).options)
        if isinstance(new, nn.Module):
            cast_new(new, module)
            inside = set(module.modules())
            for part in new.modules():
                if part not in inside:
                    part.training = module.training
        return new
