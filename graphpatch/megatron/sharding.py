"""How a parallel module of megatron-core lies over the ranks, and what its added parameters must say of themselves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..patch.record import record_of
from ..rewrites.lora_base import Adapter

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
    if getattr(module.weight, "tensor_model_parallel", False):
        return int(getattr(module.weight, "partition_stride", 1))
    if not module.config.gated_linear_unit or size_of(module) == 1:
        return 1
    # Models that are built without initialisation have no mark.
    names = ("ffn_hidden_size", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size")
    gated = {2 * width for name in names if (width := getattr(module.config, name, None))}
    return 2 if module.output_size in gated else 1


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


class Share(NamedTuple):
    """How the ranks share a tensor out: each has a part of every piece, gate and up say, one behind the other."""

    dim: int
    sizes: tuple[int, ...]
    """Along `dim`, of this rank's part of each piece."""


def share_of(module: nn.Module, name: str) -> Share | None:
    """Of a parameter of a module; None where every rank has all of it."""
    tensor = module._parameters.get(name)
    if tensor is None:
        return None
    dim = getattr(tensor, "partition_dim", -1) if getattr(tensor, "tensor_model_parallel", False) else -1
    if dim < 0:
        dim = _unmarked_dim(module, name)
    if dim < 0 or size_of(module) == 1:
        return None
    for held in record_of(module).held:
        # Of a B for parts of a linear the rows of a part stand together.
        how = held.entry.spread if isinstance(held.entry, Adapter) and held.entry.b == name else None
        if how is not None:
            return Share(dim, tuple(how.groups * how.sizes[part] for part in how.chosen))
    marked = dim == getattr(tensor, "partition_dim", -1)
    stride = getattr(tensor, "partition_stride", 1) if marked or dim else row_stride(module)
    return Share(dim, (tensor.shape[dim] // stride,) * stride)


def whole_shape(module: nn.Module, share: Share, shape: Sequence[int]) -> tuple[int, ...]:
    """Of the tensor of which each rank has a part of this shape."""
    return tuple(size * size_of(module) if dim == share.dim else size for dim, size in enumerate(shape))


def _unmarked_dim(module: nn.Module, name: str) -> int:
    """By its class, of a parameter that says nothing: models that are built without initialisation have no mark."""
    kinds = {c.__name__ for c in type(module).__mro__}
    if name == "weight" and "RowParallelLinear" in kinds:
        return 1
    return 0 if name in ("weight", "bias") and "ColumnParallelLinear" in kinds else -1


def cut(module: nn.Module, whole: Tensor, share: Share) -> Tensor:
    """This rank's part."""
    group, dim = group_of(module), share.dim
    pieces = whole.split([size * group.size() for size in share.sizes], dim)
    return torch.cat([piece.chunk(group.size(), dim)[group.rank()] for piece in pieces], dim)


def whole_of(module: nn.Module, part: Tensor, share: Share | None) -> Tensor:
    """The way back of `cut`. Called on all ranks that share the module."""
    if share is None:
        return part.detach()
    group = group_of(module)
    parts = [torch.empty_like(part) for _ in range(group.size())]
    torch.distributed.all_gather(parts, part.detach().contiguous(), group=group)
    pieces = [one.split(list(share.sizes), share.dim) for one in parts]
    order = [pieces[rank][number] for number in range(len(share.sizes)) for rank in range(group.size())]
    return torch.cat(order, share.dim)
