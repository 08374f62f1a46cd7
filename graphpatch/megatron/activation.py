"""`activation` on the `MLP` of megatron-core, which asks its config for the function."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, cast

from torch import nn

from ..ops.activation import Activation
from ..ops.op import Op
from ..rewrites.activation import FUNCTIONS
from ..rewrites.rewrite import Attributes


class MegatronActivation(Attributes):
    """Another function, in the module and in a copy of its config: the other layers share that."""

    @staticmethod
    def values(op: Op, module: nn.Module) -> Mapping[str, Any]:
        function = FUNCTIONS[cast(Activation, op).kind]
        config: Any = copy.copy(module.config)
        config.activation_func = function
        # What is fused knows some functions, and takes others for them.
        config.bias_activation_fusion = False
        return {"config": config, "activation_func": function}
