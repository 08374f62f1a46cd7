"""GPTModels whose experts stand together in one module: megatron-core's `GroupedMLP`, and Transformer Engine's grouped
linears, on stand-ins with their parameters (the real ones need a GPU)."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe import experts
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor, nn
from torch.nn import functional as F

HAS_GROUPED_MLP = hasattr(experts, "GroupedMLP")
"""Gone from 0.17 on."""


class TEGroupedLinear(nn.Module):
    split: int

    def __init__(self, num_gemms: int, input_size: int, output_size: int, *, config: Any, bias: bool, **_: Any):
        super().__init__()
        self.config, self.num_gemms, self.use_bias = config, num_gemms, bias
        self._pg_collection = ProcessGroupCollection.use_mpu_process_groups()
        self._tp_group = self._pg_collection.expt_tp
        self.tp_group = None  # Transformer Engine's own, which is set later
        self.expert_parallel = config.expert_model_parallel_size > 1
        shape = [output_size, input_size]
        shape[self.split] //= self._tp_group.size()
        self.out_features, self.in_features = shape
        for at in range(num_gemms):
            weight = nn.Parameter(torch.empty(shape))
            weight.allreduce = not self.expert_parallel  # type: ignore[attr-defined]
            self.register_parameter(f"weight{at}", weight)

    def forward(self, x: Tensor, m_splits: Any) -> tuple[Tensor, None]:
        parts = x.split(m_splits if isinstance(m_splits, list) else m_splits.tolist())
        return torch.cat([F.linear(part, getattr(self, f"weight{at}")) for at, part in enumerate(parts)]), None

    def sharded_state_dict(self, prefix: str = "", offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        return {}


class TEColumnParallelGroupedLinear(TEGroupedLinear):
    split = 0


class TERowParallelGroupedLinear(TEGroupedLinear):
    split = 1


for stand_in in (TEGroupedLinear, TEColumnParallelGroupedLinear, TERowParallelGroupedLinear):
    stand_in.__module__ = "megatron.core.extensions.transformer_engine"


def spec(kind: str, count: int) -> Any:
    """A layer's, with experts of a kind: "mlp" or "engine"."""
    if kind == "mlp":
        return get_gpt_layer_local_spec(
            num_experts=count, moe_grouped_gemm=True, moe_use_legacy_grouped_gemm=True, normalization="LayerNorm"
        )
    layer = get_gpt_layer_local_spec(num_experts=count, moe_grouped_gemm=False, normalization="LayerNorm")
    linears = {"linear_fc1": TEColumnParallelGroupedLinear, "linear_fc2": TERowParallelGroupedLinear}
    built = layer.submodules.mlp
    if isinstance(built, partial):  # a later release's
        of = partial(experts.TEGroupedMLP, submodules=experts.GroupedMLPSubmodules(**linears))
        inside = replace(built.keywords["submodules"], experts=of)
        layer.submodules.mlp = partial(built.func, **{**built.keywords, "submodules": inside})
    else:
        built.submodules.experts = ModuleSpec(module=experts.TEGroupedMLP, submodules=MLPSubmodules(**linears))
    return layer


def let_float32(model: nn.Module) -> None:
    """`GroupedMLP` asks for a config of bfloat16, which its kernel needs, and the stand-in for that does not."""
    for module in model.modules():
        if type(module).__name__ == "GroupedMLP":
            module.config = copy.copy(module.config)  # type: ignore[assignment]
            module.config.bf16 = True  # type: ignore[union-attr]
