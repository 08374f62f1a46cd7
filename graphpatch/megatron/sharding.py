"""How a parallel module of megatron-core lies over the ranks, and what its added parameters must say of themselves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..patch.record import record_of
from ..rewrites.lora_base import Adapter
from .experts import LINEAR, experts_of, is_expert, stack_of

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
    if experts_of(module) is not None:
        return 2 if module.config.gated_linear_unit else 1
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
    alone = is_expert(module) and size_of(module) == 1
    return {"tensor_model_parallel": alone, "sequence_parallel": partial, **_of_expert(module)}


def _of_expert(module: nn.Module) -> Marks:
    # Gradients of an expert that one rank of several has are not those of the others' experts.
    return {"allreduce": not (is_expert(module) and getattr(module, "expert_parallel", False))}


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
    fork = tracker.fork(get_expert_parallel_rng_tracker_name()) if is_expert(module) else tracker.fork()
    return fork  # type: ignore[no-any-return]


class Cut(NamedTuple):
    """How ranks share a tensor out along a dimension: each has a part of every piece, gate and up say, one behind the
    other."""

    dim: int
    sizes: tuple[int, ...]
    """Of this rank's part of each piece."""
    group: Any

    def own(self, whole: Tensor) -> Tensor:
        """This rank's part."""
        pieces = whole.split([size * self.group.size() for size in self.sizes], self.dim)
        return torch.cat([piece.chunk(self.group.size(), self.dim)[self.group.rank()] for piece in pieces], self.dim)

    def whole(self, part: Tensor) -> Tensor:
        """The way back. Called on all ranks of the group."""
        parts = [torch.empty_like(part) for _ in range(self.group.size())]
        torch.distributed.all_gather(parts, part.contiguous(), group=self.group)
        pieces = [one.split(list(self.sizes), self.dim) for one in parts]
        order = [pieces[rank][at] for at in range(len(self.sizes)) for rank in range(self.group.size())]
        return torch.cat(order, self.dim)


class Share(NamedTuple):
    """The part of a parameter that a rank has."""

    cuts: tuple[Cut, ...]
    shape: tuple[int, ...]
    """Of the whole."""
    part: tuple[int, ...]
    """Of what the rank has."""
    view: tuple[int, ...]
    """As what that is looked at: the cuts are along its dimensions."""

    def own(self, whole: Tensor) -> Tensor:
        """This rank's part of a tensor of `shape`."""
        found = whole.reshape(_grown(self.view, self.cuts))
        for cut in self.cuts:
            found = cut.own(found)
        return found.reshape(self.part)

    def whole(self, part: Tensor) -> Tensor:
        """The way back. Called on all ranks that share the module."""
        found = part.detach().reshape(self.view)
        for cut in self.cuts:
            found = cut.whole(found)
        return found.reshape(self.shape)


def share_of(module: nn.Module, name: str) -> Share | None:
    """Of a parameter of a module; None where every rank has all of it."""
    tensor = module._parameters.get(name)
    if tensor is None:
        return None
    stack, experts = stack_of(module, name), experts_of(module)
    view = part = tuple(tensor.shape)
    if stack is not None:
        view = stack.view
        dim, sizes = stack.dim, (view[stack.dim] // stack.pieces,) * stack.pieces
    else:
        dim, sizes = _pieces(module, name, tensor)
    cuts = [Cut(dim, sizes, group_of(module))] if dim >= 0 and size_of(module) > 1 else []
    if experts is not None and len(view) == 3 and experts.group.size() > 1:
        cuts.append(Cut(0, (experts.here,), experts.group))
    if not cuts:
        return None
    shape = _grown(view, cuts)
    return Share(tuple(cuts), shape if stack is None else stack.matrix(shape), part, view)


def _grown(shape: Sequence[int], cuts: Sequence[Cut]) -> tuple[int, ...]:
    grown = list(shape)
    for cut in cuts:
        grown[cut.dim] *= cut.group.size()
    return tuple(grown)


def _pieces(module: nn.Module, name: str, tensor: Tensor) -> tuple[int, tuple[int, ...]]:
    """The dimension along which ranks of tensor parallelism share a parameter (-1 where they do not), and the sizes of
    the pieces there."""
    marked = getattr(tensor, "partition_dim", -1) if getattr(tensor, "tensor_model_parallel", False) else -1
    dim = marked if marked >= 0 else _unmarked_dim(module, name)
    if dim < 0:
        return dim, ()
    for held in record_of(module).held:
        # Of a B for parts of a linear the rows of a part stand together.
        how = held.entry.spread if isinstance(held.entry, Adapter) and held.entry.b == name else None
        if how is not None:
            return dim, tuple(how.groups * how.sizes[part] for part in how.chosen)
    stride = getattr(tensor, "partition_stride", 1) if marked == dim or dim else row_stride(module)
    return dim, (tensor.shape[dim] // stride,) * stride


def _unmarked_dim(module: nn.Module, name: str) -> int:
    """By its class, of a parameter that says nothing: models that are built without initialisation have no mark."""
    kinds = {c.__name__ for c in type(module).__mro__}
    if LINEAR in kinds:
        rows = "TEColumnParallelGroupedLinear" in kinds
        return {"weight": 0 if rows else 1, "bias": 0 if rows else -1}.get(name.rstrip("0123456789"), -1)
    if name == "weight" and "RowParallelLinear" in kinds:
        return 1
    return 0 if name in ("weight", "bias") and "ColumnParallelLinear" in kinds else -1
