"""`rope.scale` on the rotary module of a Transformers model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from ..lang.diagnostics import ApplyError, Diagnostic
from ..ops.op import Op
from ..ops.rope_scale import RopeScale
from .rewrite import Replacement


class RopeScaled(Replacement):
    """Another of the same class, made from a config with other `rope_parameters`."""

    @staticmethod
    def build(op: Op, cls: Any, module: nn.Module, device: torch.device) -> nn.Module:
        scale = cast(RopeScale, op)
        config: Any = module.__dict__.get("config")
        before = getattr(config, "rope_parameters", None)
        if not isinstance(before, Mapping) or "rope_type" not in before:
            raise ApplyError(
                Diagnostic(
                    "GP564",
                    f"{type(module).__name__} has no config with one set of rope_parameters",
                    text=("rope.scale knows Transformers' rotary modules that have one for all layers",),
                    fixes=("load the model with a config that says its rope_parameters",),
                )
            )
        new = copy.deepcopy(config)
        new.rope_parameters = scale.parameters(before, new.max_position_embeddings)
        with torch.device(device):
            made: nn.Module = type(module)(config=new)
        return made.train(module.training)
