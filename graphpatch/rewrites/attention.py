"""Attention changed: what ops ask for, put together, and the arithmetic they share."""

from __future__ import annotations

from functools import reduce
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..ops.attention import AttentionOp
from ..ops.op import Op
from .rewrite import InPlace


class Wish(NamedTuple):
    """What one op asks for: `name` is its last word."""

    name: str
    value: Any
    text: str


class Wishes(NamedTuple):
    """Of all ops on one module; None where nobody asks."""

    cap: float | None = None
    by: float | None = None
    size: int | None = None
    causal: bool | None = None

    @property
    def masks(self) -> bool:
        return self.size is not None or self.causal is not None


def with_causality(wishes: Wishes, causal: bool) -> Wishes:
    """`_replace`, which the compiler of older PyTorch does not follow."""
    return Wishes(wishes.cap, wishes.by, wishes.size, causal)


class Attention(InPlace):
    """Of the kinds of attention: each entry is a wish."""

    level: ClassVar[int] = AttentionOp.level
    entries: ClassVar[str] = "_attention_wishes"
    _attention_wishes: tuple[Wish, ...] = ()

    @classmethod
    def entry(cls, op: Op, parameter: str | None = None) -> Wish:
        ((name, value),) = op.arguments().items()
        return Wish(name, value, op.text())

    @property
    def wishes(self) -> Wishes:
        return Wishes(**{wish.name: wish.value for wish in self._attention_wishes})


def allowed(queries: Tensor, keys: int, wishes: Wishes) -> Tensor:
    """Which keys each query may see by window and causality (... x queries x keys), from the queries' places among
    the keys."""
    own, places = queries[..., None], torch.arange(keys, device=queries.device)
    bounds = [places <= own] if wishes.causal else []
    if wishes.size is not None:
        bounds.append(places > own - wishes.size)
        if not wishes.causal:
            bounds.append(places < own + wishes.size)
    if not bounds:
        return torch.ones(*queries.shape, keys, dtype=torch.bool, device=queries.device)
    return reduce(torch.logical_and, bounds)


def narrowed(mask: Tensor, seen: Tensor) -> Tensor:
    """The mask, of either kind, less what is not `seen`."""
    return mask & seen if mask.dtype == torch.bool else torch.where(seen, mask, torch.finfo(mask.dtype).min)


def scored(products: Tensor, scale: float, cap: float | None, mask: Tensor | None) -> Tensor:
    """What the softmax is of: cap * tanh(scale * products / cap) + mask (Gemma 2, arXiv:2408.00118, section 2).

    Products of queries and keys are the caller's own, and written over: these tensors are the largest of a model, and
    a backward needs but one of them, what tanh puts out.
    """
    scores = products.mul_(scale)
    if cap is not None:
        scores = scores.div_(cap).tanh_() * cap
    return scores if mask is None else scores.add_(as_bias(mask, scores.dtype))


def as_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask to be added to scores: 0 where a key may be seen, the least finite number where not."""
    if mask.dtype == dtype:
        return mask
    if mask.dtype != torch.bool:
        # Under autocast scores are of half the width: what is the least finite number there is infinite here, and a row
        # of nothing else has no softmax.
        return mask.clamp(min=torch.finfo(dtype).min).to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
