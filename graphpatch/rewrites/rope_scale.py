"""`rope.scale` on the rotary module of a Transformers model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from ..ops.op import Op, Refusal
from ..ops.rope_scale import ORIGINAL, RopeScale
from .rewrite import Replacement


class RopeScaled(Replacement):
    """Another of the same class, made from a config with other `rope_parameters`."""

    @staticmethod
    def build(op: Op, cls: Any, module: nn.Module, device: torch.device) -> nn.Module:
        scale = cast(RopeScale, op)
        config: Any = module.__dict__.get("config")
        every: Any = getattr(config, "rope_parameters", None)
        of = scale.layer_type
        before = every.get(of) if of and isinstance(every, Mapping) else every
        if not isinstance(before, Mapping) or "rope_type" not in before:
            raise Refusal(
                f"{type(module).__name__} has no config that says its rope_parameters",
                "rope.scale knows Transformers' rotary modules: load the model with a config that says them",
                code="GP564",
            )
        if before["rope_type"] not in _KNOWN:
            raise Refusal(
                f"its positions are of the kind `{before['rope_type']}`, which rope.scale does not know how to stretch",
                "leave it out",
                code="GP564",
            )
        if before.get("mscale_all_dim"):
            raise Refusal(
                f"its rope_parameters say mscale_all_dim={before['mscale_all_dim']}: the attention around it is scaled "
                f"for the factor {before.get('factor')}, when it is built",
                "build the model from a config with the other factor",
                code="GP564",
            )
        new = copy.deepcopy(config)
        original = getattr(new, ORIGINAL, None)
        made = scale.parameters(before, original or new.max_position_embeddings)
        if original is not None and ORIGINAL in made:
            setattr(new, ORIGINAL, made[ORIGINAL])  # which wins over the parameters, in Phi 3
        new.rope_parameters = {**every, of: made} if of else made
        with torch.device(device):
            built: nn.Module = type(module)(config=new)
        return built.train(module.training)


_KNOWN = {"default", "linear", "dynamic", "yarn", "longrope", "llama3"}
