"""LoRA on the parallel linears of megatron-core: the update joins the product of this rank's part of the weight.

`ColumnParallelLinear` and `RowParallelLinear` multiply in `_forward_impl`, between their collectives and inside
whatever a subclass does around them, such as a norm fused to the end. What is added there is in the same state as the
base's own product: a shard, or a part of a sum. So training, merging and export are one function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear

from ..ops.op import Refusal
from ..rewrites.dora import RowsToLengths
from ..rewrites.lora_base import Adapter, LoraModule
from ..rewrites.lora_init import STARTS
from ..rewrites.lora_options import LoraOfWeight
from ..rewrites.merging import Merging
from .factors import Sharded
from .sharding import (
    Cut,
    Marks,
    drawn_alike,
    dropping_apart,
    group_of,
    replicated_marks,
    row_stride,
    sharded_marks,
    size_of,
)


class LoraParallel(Sharded, LoraOfWeight):
    """What columns and rows share."""

    by_row: ClassVar[bool] = False
    weight: Tensor
    skip_bias_add: bool
    sequence_parallel: bool
    explicit_expert_comm: bool
    input_dim: ClassVar[int | None]
    """The dimension of A along which ranks share it; None where all have it whole."""

    @classmethod
    def check(cls, entry: Adapter, module: nn.Module) -> None:
        refuse_shared(module)
        if not _multiplies_in_its_own_method(type(module)):
            raise Refusal(
                f"{type(module).__name__} does not multiply in `_forward_impl`, where LoRA joins it",
                "use a release of megatron-core from 0.16 on",
            )

    @classmethod
    def _start(cls, entry: Adapter, a: Tensor, b: Tensor, module: nn.Module) -> None:
        """A is drawn whole, with the fan-in of the whole weight, and cut; B is zero, as `init` has it (the op admits no
        other here)."""
        shape = list(a.shape)
        if cls.input_dim is not None:
            shape[cls.input_dim] *= size_of(module)
        whole = torch.empty(shape, dtype=a.dtype)
        with drawn_alike(module):
            for part in whole.split(entry.rank):
                STARTS[entry.init](part, b, entry.scale, lambda: module.weight, None)  # type: ignore[arg-type, return-value]
        dim = cls.input_dim
        a.copy_(whole if dim is None else Cut(dim, (a.shape[dim],), group_of(module)).own(whole))

    @staticmethod
    def matrix(module: nn.Module) -> Tensor:
        return module.weight  # type: ignore[return-value]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # Past the one of all mixins, which adds to what comes out.
        return super(LoraModule, self).forward(*args, **kwargs)

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output = super()._forward_impl(input, weight, *args, **kwargs)  # type: ignore[misc]
        return self._add_all(output, input) if self._lora else output

    def _dropped(self, adapter: Adapter, input: Tensor) -> Tensor:
        if not (adapter.dropout and self.training):
            return input
        with dropping_apart(self, self._input_is_apart):
            return dropout(input, adapter.dropout)

    @property
    def _input_is_apart(self) -> bool:
        """Whether each rank has another part of the input."""
        raise NotImplementedError

    def _unbiased(self, output: Tensor) -> Tensor:
        raise NotImplementedError


class LoraColumnParallel(LoraParallel):
    """A is whole on every rank, B has the rows of this rank's part: y_r + s B_r A x.

    Every rank's part of y depends on all of A x, so its gradient is summed over them, rank-wide, on the way back. Under
    sequence parallelism A sees the rank's part of the sequence, and A x is gathered.
    """

    input_dim = None

    @classmethod
    def attributes(cls, entry: Adapter, module: nn.Module) -> Mapping[str, Marks]:
        rows = sharded_marks(module, 0, 1 if entry.spread else row_stride(module))
        partial = bool(module.sequence_parallel) and not _caller_reduces(module)
        marks = {entry.a: replicated_marks(module, partial=partial), entry.b: rows}
        return marks | {name: rows for name in (entry.bias, entry.magnitude) if name}

    @property
    def _input_is_apart(self) -> bool:
        return self.sequence_parallel

    def _whole(self, x: Tensor) -> Tensor:
        """Of an activation on its way to products that each rank has a part of."""
        from megatron.core.tensor_parallel.mappings import (
            copy_to_tensor_model_parallel_region,
            gather_from_sequence_parallel_region,
        )

        if _caller_reduces(self):
            return x
        if self.sequence_parallel:
            return gather_from_sequence_parallel_region(x, group=group_of(self))  # type: ignore[no-any-return]
        return copy_to_tensor_model_parallel_region(x, group=group_of(self))  # type: ignore[no-any-return]

    def _low_rank(self, z: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        if _caller_reduces(self):
            a = summed_backward(a, self)
        h = self._whole(linear(z, a.to(z.dtype)))
        return linear(h if scale == 1.0 else h * scale, b.to(h.dtype))

    def _product(self, z: Tensor) -> Tensor:
        return linear(self._whole(z), self.weight)

    def _unbiased(self, output: Tensor) -> Tensor:
        return output if self.bias is None or self.skip_bias_add else output - self.bias


class LoraRowParallel(LoraParallel):
    """A has the columns of this rank's part, B is whole on every rank: the sum over ranks of W_r x_r + s B A_r x_r.

    The sum is the base's own, so the forward has no collective more. What is whole (B) is in a part of a sum on each
    rank, and its gradient is summed.
    """

    input_dim = 1

    @classmethod
    def attributes(cls, entry: Adapter, module: nn.Module) -> Mapping[str, Marks]:
        # Summed on the way back by `summed_backward`, so that no one else must.
        whole = replicated_marks(module, partial=False)
        marks = {entry.a: sharded_marks(module, 1), entry.b: whole}
        return marks | {name: whole for name in (entry.bias, entry.magnitude) if name}

    @classmethod
    def row_norms(cls, entry: Adapter, get: Callable[[str], Tensor], module: nn.Module) -> Tensor:
        """Of whole rows."""
        part = super().row_norms(entry, get, module)
        if size_of(module) == 1:
            return part
        squares = part.square()
        torch.distributed.all_reduce(squares, group=group_of(module))
        return squares.sqrt()

    @classmethod
    def merging_into(
        cls, module: nn.Module, entry: Adapter, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
    ) -> Mapping[str, Merging]:
        """Called on all ranks that share the module: DoRA scales rows of which each has a part."""
        found = dict(cls.merging(entry, tensors, shapes))
        if entry.magnitude and size_of(module) > 1:
            gained = cls._gained(*entry.factors(tensors.__getitem__), entry.scale, shapes.get("weight", ()))
            norms = cls.row_norms(entry, tensors.__getitem__, module)
            found["weight"] = RowsToLengths(gained, tensors[entry.magnitude], norms)
        return found

    @property
    def _input_is_apart(self) -> bool:
        return True

    def _low_rank(self, z: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        h = linear(z, a.to(z.dtype))
        return linear(h if scale == 1.0 else h * scale, summed_backward(b, self).to(h.dtype))

    def _product(self, z: Tensor) -> Tensor:
        return linear(z, self.weight)

    def _unbiased(self, output: Tensor) -> Tensor:
        return output  # the bias is added to the sum

    def _scaled_bias(self, adapter: Adapter, like: Tensor) -> Tensor:
        return super()._scaled_bias(adapter, like) / size_of(self)

    def _vector(self, name: str) -> Tensor:
        return summed_backward(getattr(self, name), self)


def _caller_reduces(module: Any) -> bool:
    """Whether the gradient of a column-parallel linear's input is summed over ranks by whoever gave it."""
    own = module.__dict__
    return bool(own.get("explicit_expert_comm") or own.get("disable_grad_reduce"))


def summed_backward(parameter: Tensor, module: nn.Module) -> Tensor:
    """A parameter that is whole on every rank, in a product that is a part on each: its gradient is the sum."""
    from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region

    copied = copy_to_tensor_model_parallel_region(parameter, group=group_of(module))
    return _ContiguousBackward.apply(copied)  # type: ignore[no-any-return]


class _ContiguousBackward(torch.autograd.Function):
    """The tensor itself, whose gradient is made contiguous: of any other megatron-core sums a copy, and returns what it
    was given."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad.contiguous()


def refuse_shared(module: nn.Module) -> None:
    """The output layer may compute with the embedding's weight, on whatever pipeline stage each is."""
    if getattr(getattr(module, "weight", None), "shared_embedding", False):
        raise Refusal(
            "its weight is the embedding's and the output layer's (share_embeddings_and_output_weights), and an "
            "adapter here would change this use of it alone",
            "leave it out: except embedding.** | output_layer",
            "or build the model with share_embeddings_and_output_weights=False",
            code="GP424",
        )


def _multiplies_in_its_own_method(cls: type) -> bool:
    # Its own class: one that was made of it for an earlier adapter has the same name.
    names = ("ColumnParallelLinear", "RowParallelLinear")
    owner: Any = next((c for c in cls.__mro__ if c.__name__ in names and "_forward_impl" in c.__dict__), None)
    return owner is not None and "_forward_impl" in owner.forward.__code__.co_names
