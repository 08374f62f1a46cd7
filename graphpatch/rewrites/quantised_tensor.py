"""A weight that is kept as codes and computed with as what it stands for.

torchao has such tensors too, and they are welcome as a base (`quantised.py`). These are our own since of torchao 0.18
none can be used here as it is: a deep copy of its NF4Tensor quantises again, by other blocks, or raises; `.to(dtype)`
makes it dense in silence; its int8 takes no values of a checkpoint, and keeps a dense copy of the weight from forward
to backward; its int4 needs a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from .quantised_formats import NF4, Format, Int4, Int8, encode


class QuantisedTensor(Tensor):
    """Codes and scales that are, to whoever computes with them, a tensor of (rows, columns) in `dtype`.

    It can be detached, copied, moved, transposed and saved as it is; `copy_` quantises what it is given, so a
    checkpoint of the base loads into it. In every other operation its dequantised value, made for that moment, takes
    its place: what autograd keeps for backward is the codes. It has no gradient, and nothing else writes into it.
    """

    parts: dict[str, Tensor]
    format: Format
    transposed: bool

    @staticmethod
    def __new__(
        cls, parts: dict[str, Tensor], format: Format, shape: torch.Size, dtype: torch.dtype, transposed: bool = False
    ) -> QuantisedTensor:
        """`shape` is of what is kept; where that is `transposed`, the tensor's own is the other way round."""
        rows, columns = shape
        size = (columns, rows) if transposed else (rows, columns)
        device = next(iter(parts.values())).device
        made = Tensor._make_wrapper_subclass(cls, size, dtype=dtype, device=device, requires_grad=False)  # type: ignore[attr-defined]
        made.parts, made.format, made.transposed = parts, format, transposed
        return made  # type: ignore[no-any-return]

    def __init__(self, *args: Any, **kwargs: Any):
        """All was done in `__new__`."""

    @classmethod
    def of(cls, weight: Tensor, format: Format) -> QuantisedTensor:
        """A weight of two dimensions, quantised; its dtype stays the one that it is computed with in."""
        return cls(encode(format, weight), format, weight.shape, weight.dtype)

    def again(self, value: Tensor) -> QuantisedTensor:
        """Another value of the same shape, kept and computed with as this one is."""
        return type(self)(encode(self.format, value), self.format, value.shape, self.dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:  # type: ignore[override]
        """What it stands for, in its own dtype or in this one."""
        dense = self.format.decode(self.parts).to(dtype or self.dtype)
        return dense.t() if self.transposed else dense

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Of what is kept."""
        return sum(part.nbytes for part in self.parts.values())

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"QuantisedTensor({list(self.shape)}, {self.format}, dtype={self.dtype}, device={self.device})"

    def _with(self, fn: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None, turn: bool = False) -> Any:
        """The same with `fn` of its parts."""
        shape = self.shape[::-1] if self.transposed else self.shape
        parts = {name: fn(part) for name, part in self.parts.items()}
        return type(self)(parts, self.format, torch.Size(shape), dtype or self.dtype, self.transposed is not turn)

    # ── what compilers ask ──
    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return [f"_{name}" for name in self.parts], (self.format, self.dtype, self.transposed)

    def __getattr__(self, name: str) -> Any:
        # Only for the names that `__tensor_flatten__` gives: ordinary attributes never come here.
        parts = self.__dict__.get("parts", {})
        if name[:1] == "_" and name[1:] in parts:
            return parts[name[1:]]
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], context: Any, size: torch.Size, stride: Any) -> QuantisedTensor:
        format, dtype, transposed = context
        shape = torch.Size(size[::-1] if transposed else size)
        return QuantisedTensor({name[1:]: part for name, part in inner.items()}, format, shape, dtype, transposed)

    # ── what operations do ──
    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        own = _OWN.get(func)
        if own is not None and isinstance(args[0], cls):
            return own(*args, **kwargs)
        for at, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                given = args[at] if at < len(args) else kwargs.get(argument.name)
                if any(isinstance(leaf, cls) for leaf in tree_leaves(given)):
                    raise RuntimeError(f"{func} would write into a quantised weight; copy_ and nothing else may")
        args, kwargs = tree_map_only(cls, cls.dequantize, (args, kwargs))
        return func(*args, **kwargs)


aten = torch.ops.aten


def _to_copy(
    weight: QuantisedTensor, *, dtype: Any = None, device: Any = None, non_blocking: bool = False, **_: Any
) -> QuantisedTensor:
    """Another device moves the codes; another dtype is that of the values they stand for."""
    return weight._with(lambda part: part.to(device=device, non_blocking=non_blocking, copy=True), dtype)  # type: ignore[no-any-return]


def _copy(weight: QuantisedTensor, source: Tensor, non_blocking: bool = False) -> QuantisedTensor:
    alike = isinstance(source, QuantisedTensor) and source.format == weight.format
    if not alike or source.transposed is not weight.transposed:  # type: ignore[attr-defined]
        value = source.dequantize() if isinstance(source, QuantisedTensor) else source
        value = value.to(weight.device).expand(weight.shape)
        source = QuantisedTensor.of(value.t() if weight.transposed else value, weight.format)
    for name, part in weight.parts.items():
        part.copy_(source.parts[name], non_blocking)  # type: ignore[attr-defined]
    return weight


def _turned(weight: QuantisedTensor, *dims: int) -> QuantisedTensor:
    same = bool(dims) and dims[0] % 2 == dims[1] % 2
    return weight._with(lambda part: part, turn=not same)  # type: ignore[no-any-return]


_OWN: dict[Any, Callable[..., Any]] = {
    aten.detach.default: lambda weight: weight._with(aten.detach.default),
    aten.alias.default: lambda weight: weight._with(aten.alias.default),
    aten.empty_like.default: lambda weight, *, dtype=None, device=None, **_: weight._with(
        lambda part: torch.empty_like(part, device=device), dtype
    ),
    aten.clone.default: lambda weight, memory_format=None: weight._with(torch.clone),
    aten._to_copy.default: _to_copy,
    aten.copy_.default: _copy,
    aten.t.default: _turned,
    aten.transpose.int: _turned,
}
"""The operations that it remains quantised in."""

# A state dict with such weights loads by `torch.load(..., weights_only=True)` once this file was imported.
torch.serialization.add_safe_globals([QuantisedTensor, NF4, Int4, Int8])
