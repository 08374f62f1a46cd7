"""`cast` on any module."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils._pytree import tree_leaves, tree_map

from ..ops.cast import Cast
from ..ops.op import Op
from .rewrite import InPlace


class Into(NamedTuple):
    dtype: torch.dtype
    keep: bool
    text: str


class Casting(InPlace):
    """Computes with casts of its inputs and parameters."""

    level: ClassVar[int] = Cast.level
    entries: ClassVar[str] = "_cast"
    _cast: tuple[Into, ...] = ()

    @classmethod
    def entry(cls, op: Op, parameter: str | None = None) -> Into:
        into = cast(Cast, op)
        return Into(getattr(torch, into.dtype), into.keep, into.text())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self._cast:
            return super().forward(*args, **kwargs)
        dtype, keep, _ = self._cast[-1]
        given = [x.dtype for x in tree_leaves((args, kwargs)) if _floats(x)]
        args, kwargs = tree_map(lambda x: x.to(dtype) if _floats(x) else x, (args, kwargs))
        module = cast(nn.Module, self)
        # What `torch.func.functional_call` does, which would go through this forward, and the hooks, once more.
        with _reparametrize_module(
            module, {n: p.to(dtype) for n, p in module.named_parameters(remove_duplicate=False) if _floats(p)}
        ):
            output = super().forward(*args, **kwargs)
        if keep or not given:
            return output
        return tree_map(lambda y: y.to(given[0]) if _floats(y) and y.dtype == dtype else y, output)


def _floats(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()
