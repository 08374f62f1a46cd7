"""A tiny GPTModel whose weights are the same function of the layout of ranks: each is drawn whole, by its global name."""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import nn

from .grouped import let_float32, spec

VOCABULARY, LENGTH, BATCH = 96, 12, 2


class RMSNorm(nn.Module):
    """What megatron's spec takes as a norm, with the mark that sequence parallelism asks for."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **_: Any):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


def config(**changes: Any) -> TransformerConfig:
    """hidden 64, 4 layers, 4 heads and 2 groups of 24 (so that 4 x 24 is not 64), gated 112."""
    defaults: dict[str, Any] = {
        "num_layers": 4,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 24,
        "ffn_hidden_size": 112,
        "gated_linear_unit": True,
        "activation_func": partial(nn.functional.gelu, approximate="tanh"),
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "use_cpu_initialization": True,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        "params_dtype": torch.float32,
        "pipeline_dtype": torch.float32,
        "batch_p2p_sync": False,
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
        "virtual_pipeline_model_parallel_size": parallel_state.get_virtual_pipeline_model_parallel_world_size(),
        "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
        "expert_tensor_parallel_size": parallel_state.get_expert_tensor_parallel_world_size(),
    }
    known = inspect.signature(TransformerConfig).parameters
    return TransformerConfig(**{k: v for k, v in {**defaults, **changes}.items() if k in known})


def gpt(
    tied: bool = False, vp_stage: int | None = None, gather: bool = False, grouped: str | None = None, **changes: Any
) -> GPTModel:
    """This rank's part of the model (of a virtual stage, where one is given). `grouped` is a kind of experts."""
    made = config(**changes)
    layer = get_gpt_layer_local_spec(
        num_experts=made.num_moe_experts, moe_grouped_gemm=False, normalization="LayerNorm"
    )
    if grouped is not None:
        layer = spec(grouped, made.num_moe_experts)
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    if made.qk_layernorm:
        attention = layer.submodules.self_attention.submodules
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    count = _layers_here(made, vp_stage)
    model = GPTModel(
        config=made,
        transformer_layer_spec=TransformerBlockSubmodules([layer] * count, RMSNorm),
        vocab_size=VOCABULARY,
        max_sequence_length=64,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        parallel_output=not gather,
        share_embeddings_and_output_weights=tied,
        position_embedding_type="rope",
        vp_stage=vp_stage,
    )
    let_float32(model)
    fill(model)
    return model


def _layers_here(made: TransformerConfig, vp_stage: int | None) -> int:
    from megatron.core.transformer.transformer_block import get_num_layers_to_build

    return int(get_num_layers_to_build(made, vp_stage=vp_stage))


def global_name(model: nn.Module, name: str) -> str:
    """A parameter's name with the number that its layer and its expert have in the whole model."""
    parts = name.removeprefix("module.").split(".")
    for at, part in enumerate(parts):
        above = model.get_submodule(".".join(name.split(".")[: at + name.startswith("module.")])) if at else None
        if part.isdigit() and above is not None:
            layer = above[int(part)]
            if isinstance(layer, TransformerLayer):
                parts[at] = str(layer.layer_number - 1)
            elif at and parts[at - 1] == "local_experts":
                parts[at] = str(parallel_state.get_expert_model_parallel_rank() * len(above) + int(part))
    return ".".join(parts)


def fill(model: nn.Module, only: Callable[[str], bool] = lambda name: True, seed: int = 0) -> None:
    """Give parameters values that depend on their global name alone, each rank its shard of the whole."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.of_expert = ".experts." in name
            for piece in pieces(model, name, parameter) if only(name) else ():
                generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}{piece.name}".encode()))
                whole = torch.randn(whole_shape(piece.like), generator=generator) * 0.1
                if name.endswith(("norm.weight", "lora_magnitude")):
                    whole = 1 + whole
                piece.of(parameter).copy_(shard(piece.like, whole))


class Piece(NamedTuple):
    """A parameter; or, of one that holds many experts, what is one expert's."""

    name: str
    """In the whole model, where each expert has linears of its own."""
    of: Callable[[torch.Tensor], torch.Tensor]
    """The view of it, in a tensor of the parameter's shape."""
    like: Any
    """Its shape, and how ranks share it."""


def pieces(model: nn.Module, name: str, parameter: nn.Parameter) -> list[Piece]:
    path, _, own = name.rpartition(".")
    if ".experts" not in path or "local_experts" in path:
        return [Piece(global_name(model, name), lambda tensor: tensor, parameter)]
    experts: Any = model.get_submodule(path.rpartition("experts")[0] + "experts")
    count, hidden = experts.num_local_experts, experts.config.hidden_size
    if "linear_fc" in path:  # Transformer Engine's
        linear = path.rpartition(".")[2]
        base, factor = own.removeprefix("weight"), own
    else:
        stack, _, factor = own.partition("_")
        linear, base = {"weight1": "linear_fc1", "weight2": "linear_fc2"}[stack], "" if factor else own
    found = []
    for at in range(count):
        if base.isdigit():
            if int(base) != at:
                continue
            view = lambda tensor: tensor  # noqa: E731
        elif base.startswith("weight"):
            shape = (count, hidden, -1) if linear == "linear_fc1" else (count, -1, hidden)
            view = lambda tensor, at=at, shape=shape: tensor.view(shape)[at].T  # type: ignore[misc] # noqa: E731
        else:
            view = lambda tensor, at=at: tensor[at]  # type: ignore[misc] # noqa: E731
        kind = factor if factor.startswith("lora") else "weight"
        marks = _SHARED.get((linear, kind))
        like = SimpleNamespace(shape=view(parameter).shape, of_expert=True, tensor_model_parallel=marks is not None)
        if marks is not None:
            like.partition_dim = marks
            like.partition_stride = 2 if linear == "linear_fc1" and experts.config.gated_linear_unit else 1
        number = parallel_state.get_expert_model_parallel_rank() * count + at
        above = global_name(model, path.rpartition(".experts")[0] + ".experts.x").removesuffix(".x")
        found.append(Piece(f"{above}.local_experts.{number}.{linear}.{kind}", view, like))
    return found


_SHARED = {
    ("linear_fc1", "weight"): 0,
    ("linear_fc1", "lora_B"): 0,
    ("linear_fc2", "weight"): 1,
    ("linear_fc2", "lora_A"): 1,
}
"""Of an expert's linears, the dimension that ranks of tensor parallelism share."""


def _group(parameter: Any) -> tuple[int, int]:
    """The rank and the size of the group that shares a sharded parameter; one of one for another."""
    if not getattr(parameter, "tensor_model_parallel", False) or getattr(parameter, "partition_dim", -1) < 0:
        return 0, 1
    if getattr(parameter, "of_expert", False):
        group = parallel_state.get_expert_tensor_parallel_group()
    else:
        group = parallel_state.get_tensor_model_parallel_group()
    return group.rank(), group.size()


def whole_shape(parameter: Any) -> list[int]:
    shape = list(parameter.shape)
    _, size = _group(parameter)
    if size > 1:
        shape[parameter.partition_dim] *= size  # type: ignore[attr-defined]
    return shape


def shard(parameter: Any, whole: torch.Tensor) -> torch.Tensor:
    """This rank's part, as `partition_dim` and `partition_stride` say."""
    rank, size = _group(parameter)
    if size == 1:
        return whole
    dim = parameter.partition_dim
    pieces = whole.split([size * rows for rows in _pieces(parameter)], dim)
    return torch.cat([piece.chunk(size, dim)[rank] for piece in pieces], dim)


def _pieces(parameter: Any) -> list[int]:
    """The rows (or columns) of a shard that are a part of each piece of the whole."""
    stride, length = parameter.partition_stride, parameter.shape[parameter.partition_dim]  # type: ignore[attr-defined]
    return getattr(parameter, "pieces", None) or [length // stride] * stride


def gathered(parameter: Any, value: torch.Tensor) -> torch.Tensor:
    """The whole of something (a gradient) that is sharded as a parameter is."""
    _, size = _group(parameter)
    if size == 1:
        return value.detach().clone()
    expert = getattr(parameter, "of_expert", False)
    group = (
        parallel_state.get_expert_tensor_parallel_group()
        if expert
        else parallel_state.get_tensor_model_parallel_group()
    )
    parts = [torch.empty_like(value) for _ in range(size)]
    torch.distributed.all_gather(parts, value.detach().contiguous(), group=group)
    dim, sizes = parameter.partition_dim, _pieces(parameter)  # type: ignore[attr-defined]
    pieces = [part.split(sizes, dim) for part in parts]
    return torch.cat([pieces[rank][at] for at in range(len(sizes)) for rank in range(size)], dim)
