"""Modules written by hand, which call `F.scaled_dot_product_attention`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..lang.diagnostics import ApplyError, Diagnostic
from .attention import Attention, Wishes, allowed, narrowed, scored, with_causality


class SdpaAttention(Attention):
    """Every call of `F.scaled_dot_product_attention` within the module's forward is changed."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        wishes = self.wishes
        if not self._attention_wishes or wishes == Wishes():
            return super().forward(*args, **kwargs)
        calls: list[None] = []
        with _Rerouted(wishes, calls):
            output = super().forward(*args, **kwargs)
        if not calls:
            raise ApplyError(
                Diagnostic(
                    "GP553",
                    f"{type(self).__name__} never called F.scaled_dot_product_attention, so nothing was changed",
                    text=tuple(wish.text for wish in self._attention_wishes),
                    fixes=("target the module whose forward calls it", "leave this one out"),
                )
            )
        return output


class _Rerouted(TorchFunctionMode):
    def __init__(self, wishes: Wishes, calls: list[None]):
        super().__init__()
        self.wishes, self.calls = wishes, calls

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.calls.append(None)
            return attention(self.wishes, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def attention(
    wishes: Wishes,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`F.scaled_dot_product_attention` with what is asked for: query (... x heads x queries x width)."""
    scale = wishes.by if wishes.by is not None else scale
    causal = is_causal if wishes.causal is None else wishes.causal
    if wishes.size is not None or causal or (wishes.causal is False and attn_mask is not None):
        attn_mask = _masked(query, key, attn_mask, with_causality(wishes, causal), wishes.causal is False)
    if wishes.cap is None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, scale=scale, enable_gqa=enable_gqa
        )
    if enable_gqa and query.shape[-3] != key.shape[-3]:
        times = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(times, -3), value.repeat_interleave(times, -3)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = scored(query @ key.transpose(-2, -1), scale, wishes.cap, attn_mask)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    return F.dropout(weights, dropout_p, dropout_p > 0.0) @ value


def _masked(query: Tensor, key: Tensor, mask: Tensor | None, wishes: Wishes, opened: bool) -> Tensor:
    queries, keys = query.shape[-2], key.shape[-2]
    if mask is not None and opened:
        raise ApplyError(
            Diagnostic(
                "GP554",
                "attention.causal(false) cannot take causality out of a mask that a module makes itself",
                fixes=("give the module another mask",),
            )
        )
    # With a cache the queries are the last of the keys.
    seen = allowed(torch.arange(queries, device=query.device) + (keys - queries), keys, wishes)
    return seen if mask is None else narrowed(mask, seen)
