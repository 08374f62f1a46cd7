"""LoRA on Transformer Engine's linears: on stand-ins for them that hold the same tensors under the same names, and put
out the same in the same state. The real ones need a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor, nn
from torch.nn import functional as F

import graphpatch

from .models import BATCH, LENGTH, config, fill, gathered
from .pool import one, ranks

ENGINE = "megatron.core.extensions.transformer_engine"
IN, OUT = 48, 64


class Linear(nn.Module):
    def __init__(self, sequence_parallel: bool, split: int, zero_centered: bool = False):
        super().__init__()
        self.config = config(sequence_parallel=sequence_parallel)
        self._tp_group = parallel_state.get_tensor_model_parallel_group()
        self.tp_group = None  # Transformer Engine's own, which is set later
        self.tp_size, self.sequence_parallel = self._tp_group.size(), sequence_parallel
        shape = [OUT, IN]
        shape[split] //= self.tp_size
        self.out_features, self.in_features = shape
        self.weight = nn.Parameter(torch.empty(shape))
        self.weight.__dict__.update(tensor_model_parallel=True, partition_dim=split, partition_stride=1)
        self.register_parameter("bias", None)
        self.eps, self.zero_centered_gamma = 1e-5, zero_centered

    def sharded_state_dict(self, prefix: str = "", offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        return {}


class TEColumnParallelLinear(Linear):
    def __init__(self, sequence_parallel: bool):
        super().__init__(sequence_parallel, 0)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        if self.sequence_parallel:
            return F.linear(gather_from_sequence_parallel_region(x), self.weight), None
        return F.linear(copy_to_tensor_model_parallel_region(x), self.weight), None


class TELayerNormColumnParallelLinear(TEColumnParallelLinear):
    normalization = "RMSNorm"

    def __init__(self, sequence_parallel: bool):
        super().__init__(sequence_parallel)
        self.zero_centered_gamma = True
        self.layer_norm_weight = nn.Parameter(torch.zeros(IN))

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return super().forward(F.rms_norm(x, (IN,), 1 + self.layer_norm_weight, self.eps))


class LayerNorm(TELayerNormColumnParallelLinear):
    normalization = "LayerNorm"

    def __init__(self, sequence_parallel: bool):
        super().__init__(sequence_parallel)
        self.zero_centered_gamma = False
        self.layer_norm_bias = nn.Parameter(torch.zeros(IN))

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        z = F.layer_norm(x, (IN,), self.layer_norm_weight, self.layer_norm_bias, self.eps)
        return TEColumnParallelLinear.forward(self, z)


class TERowParallelLinear(Linear):
    def __init__(self, sequence_parallel: bool):
        super().__init__(sequence_parallel, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        summed = reduce_scatter_to_sequence_parallel_region if self.sequence_parallel else None
        return (summed or reduce_from_tensor_model_parallel_region)(F.linear(x, self.weight)), None


for stand_in in (TEColumnParallelLinear, TELayerNormColumnParallelLinear, TERowParallelLinear):
    stand_in.__module__ = ENGINE
KINDS = [TEColumnParallelLinear, TELayerNormColumnParallelLinear, LayerNorm, TERowParallelLinear]


def computed(kind: type[Any], sequence_parallel: bool) -> dict[str, Tensor]:
    model = nn.ModuleDict({"proj": kind(sequence_parallel)})
    patch = graphpatch.apply(model, graphpatch.parse("patch proj with lora(rank=4, alpha=8)\nfreeze ** except @new"))
    for parameter in model.parameters():
        parameter.of_expert = False
    fill(model)
    proj: Any = model["proj"]
    group, row = proj._tp_group, kind is TERowParallelLinear
    x = torch.randn(LENGTH, BATCH, IN, generator=torch.Generator().manual_seed(2)).requires_grad_()
    mine = x.chunk(group.size(), -1)[group.rank()] if row else x
    if sequence_parallel and not row:
        mine = x.chunk(group.size())[group.rank()]
    y, bias = proj(mine)
    weights = torch.arange(LENGTH * OUT, dtype=torch.float32).reshape(LENGTH, 1, OUT) / 100
    if not row:
        weights = weights.chunk(group.size(), -1)[group.rank()]
    elif sequence_parallel:
        weights = weights.chunk(group.size())[group.rank()]
    (y * weights).sum().backward()
    for parameter in (proj.lora_A, proj.lora_B):
        if getattr(parameter, "sequence_parallel", False):
            torch.distributed.all_reduce(parameter.grad, group=group)  # as `finalize_model_grads` does
    found = {"bias": torch.tensor(bias is None), "x": x.detach()}
    found |= {n: gathered(p, p.data) for n, p in proj.named_parameters()}
    found |= {f"grad of {n}": gathered(p, p.grad) for n, p in proj.named_parameters() if p.grad is not None}
    dim = 0 if row else -1
    parts = [torch.empty_like(y) for _ in range(group.size())]
    torch.distributed.all_gather(parts, y.detach().contiguous(), group=group)
    found["y"] = y.detach() if row and not sequence_parallel else torch.cat(parts, dim)
    given = torch.zeros_like(x) if x.grad is None else x.grad
    if sequence_parallel or row:
        torch.distributed.all_reduce(given, group=group)
    patch.merge()
    merged = [torch.empty_like(y) for _ in range(group.size())]
    torch.distributed.all_gather(merged, proj(mine)[0].detach().contiguous(), group=group)
    found["merged"] = merged[0] if row and not sequence_parallel else torch.cat(merged, dim)
    return found | {"grad of x": given}


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_lora_over_ranks(kind):
    alone = one(computed, kind, False)
    z = alone["x"]
    if "layer_norm_bias" in alone:
        z = F.layer_norm(z, (IN,), alone["layer_norm_weight"], alone["layer_norm_bias"], 1e-5)
    elif "layer_norm_weight" in alone:
        z = F.rms_norm(z, (IN,), 1 + alone["layer_norm_weight"], 1e-5)
    wanted = F.linear(z, alone["weight"] + 2 * alone["lora_B"] @ alone["lora_A"])
    torch.testing.assert_close(alone["y"], wanted, rtol=1e-5, atol=1e-5)
    assert {name for name in alone if name.startswith("grad")} == {"grad of lora_A", "grad of lora_B", "grad of x"}
    for sequence_parallel in (False, True):
        for found in (alone, *ranks(computed, kind, sequence_parallel, tp=2)):
            torch.testing.assert_close(found["merged"], found["y"], rtol=1e-4, atol=1e-4)
            for name, value in alone.items():
                torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


class TEFusedMLP(nn.Module):
    """Which computes with the weights of its linears."""

    def __init__(self) -> None:
        super().__init__()
        self.linear_fc1, self.linear_fc2 = TELayerNormColumnParallelLinear(False), TERowParallelLinear(False)


TEFusedMLP.__module__ = ENGINE


def within_a_fused_mlp() -> str:
    model = nn.ModuleDict({"mlp": TEFusedMLP()})
    with pytest.raises(graphpatch.Error) as caught:
        graphpatch.apply(model, graphpatch.parse("patch linear_fc1 with lora(rank=4)"))
    return caught.value.code


def test_linears_that_are_never_called_are_refused():
    assert one(within_a_fused_mlp) == "GP503"


def refused() -> list[str]:
    codes = []
    for options in ("dora=true", "bias=true", 'init="pissa"'):
        model = nn.ModuleDict({"proj": TERowParallelLinear(False)})
        try:
            graphpatch.apply(model, graphpatch.parse(f"patch proj with lora(rank=4, {options})"))
        except graphpatch.Error as error:
            codes.append(error.code)
    return codes


def test_options_without_effect_there_are_refused():
    assert one(refused) == ["GP410"] * 3
