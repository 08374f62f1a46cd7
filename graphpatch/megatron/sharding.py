"""How a parallel module of megatron-core lies over the ranks, and what its added parameters must say of themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

Marks = dict[str, Any]
"""Attributes of a parameter, by which megatron-core sums gradients, takes norms, and shards optimizers."""


def group_of(module: nn.Module) -> Any:
    """The ranks that share the module's weight: those of tensor parallelism, or of an expert's."""
    own: Any = getattr(module, "tp_group", None)
    # Transformer Engine keeps one of its own under that name, which may not be set yet.
    return module._tp_group if own is None else own


def size_of(module: nn.Module) -> int:
    return int(group_of(module).size())


def sharded_marks(module: nn.Module, dim: int, stride: int = 1) -> Marks:
    """Of a parameter of which each rank has a part, along `dim`."""
    return {"tensor_model_parallel": True, "partition_dim": dim, "partition_stride": stride, **_of_expert(module)}


def row_stride(module: Any) -> int:
    """2 where the rows of a rank are [gate; up], each a part of all of its kind; else 1."""
    stride = int(getattr(module.weight, "partition_stride", 1))
    config = module.config
    if stride == 1 and config.gated_linear_unit and size_of(module) > 1:
        # Models that are built without initialisation have no mark.
        names = ("ffn_hidden_size", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size")
        gated = {2 * width for name in names if (width := getattr(config, name, None))}
        # Of Transformer Engine's linears `out_features` are those of a rank.
        rows = getattr(module, "output_size", None) or module.out_features * size_of(module)
        return 2 if rows in gated else 1
    return stride


def replicated_marks(module: nn.Module, *, partial: bool) -> Marks:
    """Of a parameter that all ranks have. `partial`: each has the gradient of its part of the sequence alone, so that
    `finalize_model_grads` must sum them."""
    # Of an expert that one rank has alone there is no duplicate, whatever the size of tensor parallelism around it.
    alone = bool(getattr(module, "is_expert", False)) and size_of(module) == 1
    return {"tensor_model_parallel": alone, "sequence_parallel": partial, **_of_expert(module)}


def _of_expert(module: nn.Module) -> Marks:
    expert = bool(getattr(module, "is_expert", False))
    # Gradients of an expert that one rank of several has are not those of the others' experts.
    return {"allreduce": not (expert and getattr(module, "expert_parallel", False))}


@contextmanager
def drawn_alike(module: nn.Module) -> Iterator[None]:
    """Within, the CPU's generator draws the same on all ranks that share the module, whatever their number.

    The first of them draws the seed. So what is drawn as a whole, and then cut, is the same function of a run's seed at
    any size of tensor parallelism.
    """
    seed = torch.randint(2**62, (), dtype=torch.int64)
    group = group_of(module)
    if group.size() > 1:
        device = next(module.parameters()).device
        agreed = seed.to(device)
        torch.distributed.broadcast(agreed, torch.distributed.get_global_rank(group, 0), group=group)
        seed = agreed.cpu()
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(int(seed))
    try:
        yield
    finally:
        torch.set_rng_state(before)


def dropping_apart(module: nn.Module, apart: bool) -> AbstractContextManager[None]:
    """Around a dropout: ranks that have different parts of an activation (`apart`) draw different masks, those that
    have the same draw the same."""
    if not apart:
        return nullcontext()
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, get_expert_parallel_rng_tracker_name

    tracker = get_cuda_rng_tracker()
    if not tracker.is_initialized():
        return nullcontext()
    fork = (
        tracker.fork(get_expert_parallel_rng_tracker_name()) if getattr(module, "is_expert", False) else tracker.fork()
    )
    return fork  # type: ignore[no-any-return]


def cut(module: nn.Module, whole: Tensor, dim: int, stride: int = 1) -> Tensor:
    """This rank's part along `dim`: of each of `stride` pieces one behind the other, gate and up say, its own."""
    group = group_of(module)
    return torch.cat([piece.chunk(group.size(), dim)[group.rank()] for piece in whole.chunk(stride, dim)], dim)


def whole_of(module: nn.Module, part: Tensor, dim: int, stride: int = 1) -> Tensor:
    """The way back of `cut`. Called on all ranks that share the module."""
    group = group_of(module)
    if group.size() == 1:
        return part.detach()
    parts = [torch.empty_like(part) for _ in range(group.size())]
    torch.distributed.all_gather(parts, part.detach().contiguous(), group=group)
    pieces = [one.chunk(stride, dim) for one in parts]
    return torch.cat([pieces[at][number] for number in range(stride) for at in range(group.size())], dim)
