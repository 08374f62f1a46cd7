"""What a distributed checkpoint is told of the tensors that a patch added to a parallel module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops.lora_parts import Spread
from ..patch.record import record_of
from ..rewrites.lora_base import Adapter
from ..rewrites.rewrite import InPlace
from .experts import Experts, experts_of
from .sharding import group_of

Offsets = Any
"""(axis, position, size) of dimensions that stand before a tensor's own: its layer's, its expert's."""


class Sharded(InPlace):
    """Of the adapters on a parallel module: what they added stands beside what the module itself says it has."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Offsets = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Of the layers of a homogeneous model a checkpoint makes one tensor. An adapter may be on some of them alone,
        so each of its tensors has a key of its own, which ends in the numbers of its layer and of its expert."""
        found: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)  # type: ignore[misc]
        place = "".join(f".{position}" for _, position, _ in sharded_offsets)
        for held in record_of(self).held:
            if isinstance(held.entry, Adapter):
                for name in held.entry.tensors:
                    spread = held.entry.spread if name == held.entry.b else None
                    key, tensor = f"{prefix}{name}{place}", getattr(self, name)
                    found[prefix + name] = _entry(self, key, tensor, spread, metadata)
        return found


def _entry(module: nn.Module, key: str, tensor: Tensor, spread: Spread | None, metadata: Any) -> Any:
    dim, stride = getattr(tensor, "partition_dim", None), getattr(tensor, "partition_stride", 1)
    if dim is None:
        return _sharded(module, key, tensor, None, metadata)
    sizes = [tensor.shape[dim] // stride] * stride
    if spread is not None:
        sizes = [spread.groups * spread.sizes[part] for part in spread.chosen]
    if len(sizes) == 1:
        return _sharded(module, key, tensor, dim, metadata)
    return _pieces(module, key, tensor, dim, sizes, metadata)


def _sharded(module: nn.Module, key: str, tensor: Tensor, dim: int | None, metadata: Any) -> Any:
    """Of a tensor of which each rank has a part along `dim`, or all (None)."""
    from megatron.core import parallel_state
    from megatron.core.utils import make_sharded_tensor_for_checkpoint, make_tp_sharded_tensor_for_checkpoint

    experts = experts_of(module)
    if experts is not None:
        return _of_experts(key, tensor, dim, experts, group_of(module))
    known = (metadata or {}).get("dp_cp_group")
    groups = {
        "tp_group": group_of(module),
        "dp_cp_group": known or parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    if dim is None:
        return make_sharded_tensor_for_checkpoint(tensor, key, **groups)
    return make_tp_sharded_tensor_for_checkpoint(tensor, key, dim, **groups)


def _of_experts(key: str, tensor: Tensor, dim: int | None, experts: Experts, group: Any) -> Any:
    """Of a tensor whose first dimension are the experts of this rank."""
    from megatron.core.dist_checkpointing import ShardedTensor

    offsets = [(0, experts.group.rank(), experts.group.size())]
    if dim is not None:
        offsets.append((dim, group.rank(), group.size()))
    replica = (0, group.rank() if dim is None else 0, experts.replicas.rank())
    return ShardedTensor.from_rank_offsets(key, tensor.detach(), *offsets, replica_id=replica)


def _pieces(module: nn.Module, key: str, tensor: Tensor, dim: int, sizes: list[int], metadata: Any) -> Any:
    """Of rows that are several matrices one behind the other, each shared out by itself: gate and up, or q and v."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    @torch.no_grad()
    def build(key: str, tensor: Tensor, replica: Any, flattened_range: slice | None = None) -> list[Any]:
        if flattened_range is not None:
            raise NotImplementedError("optimizer states by flattened ranges: use fully_reshardable or dp_reshardable")
        parts = tensor.split(sizes, dim)
        made = [_sharded(module, f"{key}.part{at}", part, dim, metadata) for at, part in enumerate(parts)]
        for piece in made:
            piece.replica_id = replica
        return made

    @torch.no_grad()
    def merge(parts: list[Tensor]) -> Tensor:
        return torch.cat(list(parts), dim)

    like = _sharded(module, key, tensor, dim, metadata)
    return ShardedTensorFactory(key, tensor, build, merge, like.replica_id)
