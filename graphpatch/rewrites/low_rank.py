"""The arithmetic of a low-rank update, y + s B A z: composed of ordinary ops, and fused for eager training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.functional import linear


def low_rank(z: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale * (z A^T) B^T, for z of (..., in), A of (rank, in), B of (out, rank).

    Computed in z's dtype, whatever the factors are kept in, and right under autocast, torch.func and tracing alike.
    """
    h = linear(z, _as(a, z.dtype))
    return linear(h if scale == 1.0 else h * scale, _as(b, h.dtype))


def add_low_rank(y: Tensor, z: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """y + scale * (z A^T) B^T, for y of (..., out)."""
    return y + _as(low_rank(z, a, b, scale), y.dtype)


SMALL = 2**14
"""Elements of an input, up to which the calls cost more than the arithmetic, and ordinary ops cost less than a node."""


def fusible(x: Tensor, weight: Tensor) -> bool:
    """Whether `LinearWithLowRank` is to be used: eager training on plain tensors, and nobody is looking on."""
    return (
        not torch.compiler.is_compiling()  # first: to a compiler this is a constant, and the rest is not traced
        and torch.is_grad_enabled()
        and torch._C._get_tracing_state() is None
        and x.numel() >= SMALL
        and type(x) in _PLAIN
        and type(weight) in _PLAIN
        and x.dtype == weight.dtype
        and x.dim() > 1
        and not x.is_nested
        and not x.is_meta  # of which autocast knows nothing, and raises
        and not torch.is_autocast_enabled(x.device.type)
        and not _observed()
    )


_PLAIN = (Tensor, nn.Parameter)
_functorch_stack = torch._C._functorch.peek_interpreter_stack
"""Private, and the only way to know that a torch.func transform is on: old-style Functions raise under one."""


def _observed() -> bool:
    return (
        _functorch_stack() is not None
        or forward_ad._current_level >= 0  # a dual level without torch.func: this Function has no jvp
    )


class LinearWithLowRank(torch.autograd.Function):
    """W x + c + scale * B A z in one node of the graph; z is x, or x after dropout.

    Against the composed form it saves no product of the adapter but the rank-wide one, adds into the base's output
    instead of allocating beside it, and keeps no copy of the input in the dtype of the factors.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, z: Tensor | None, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        source = x if z is None else z
        h = linear(_rows(source), _as(a, x.dtype))
        # Into memory of its own: what `linear` gives may be a view, and autograd lets nobody write into that in place.
        y = x.new_empty(*x.shape[:-1], weight.shape[0])
        rows = y if y.dim() == 2 else y.view(-1, y.shape[-1])
        low = _as(b, x.dtype).t()
        if x.is_cpu:
            # The thin product first: what the large one then adds into costs no pass of its own.
            if bias is None:
                rows.addmm_(h, low, beta=0, alpha=scale)
            else:
                torch.addmm(bias, h, low, alpha=scale, out=rows)
            rows.addmm_(_rows(x), weight.t())
        else:  # elsewhere a product that adds may be another kernel, of other bits than the base's own
            if bias is None:
                torch.mm(_rows(x), weight.t(), out=rows)
            else:
                torch.addmm(bias, _rows(x), weight.t(), out=rows)
            rows.addmm_(h, low, alpha=scale)
        needs = ctx.needs_input_grad
        trained = needs[4] or needs[5]
        ctx.scale, ctx.own_input = scale, z is None
        ctx.save_for_backward(
            x if needs[2] or (trained and z is None) else None,
            source if trained and z is not None else None,
            weight,
            a,
            b,
            h if needs[5] else None,
        )
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, z, weight, a, b, h = ctx.saved_tensors  # once: activation checkpointing allows no second reading
        need_x, need_z, need_weight, need_bias, need_a, need_b, _ = ctx.needs_input_grad
        grad, scale, again = grads[0], ctx.scale, torch.is_grad_enabled()
        shape, dtype = grad.shape[:-1], grad.dtype
        g = _rows(grad)
        source: Any = x if ctx.own_input else z
        if source is not None:
            source = _rows(source)
        a_, b_ = _as(a, dtype), _as(b, dtype)

        grad_x = grad_z = grad_weight = grad_bias = grad_a = grad_b = None
        if need_a or need_z or (need_x and ctx.own_input):
            back = g.mm(b_) if scale == 1.0 else g.mm(b_) * scale  # (n, rank)
            if need_a:
                grad_a = back.t().mm(source).to(a.dtype)
            if need_z:
                grad_z = back.mm(a_).view(*shape, a.shape[1])
        if need_b:
            # The saved product is a constant; a second derivative goes through it to z and A.
            inner = linear(source, a_) if again else h
            # Thin matrix first: g^T h takes twice as long on a CPU as its transpose does. Laid out as B is while it is
            # in the cache, or autograd copies it later.
            grad_b = (inner if scale == 1.0 else inner * scale).t().mm(g).t().to(b.dtype).contiguous()
        if need_x:
            if ctx.own_input and again:
                grad_x = torch.addmm(g.mm(weight), back, a_)
            elif ctx.own_input:
                grad_x = back.mm(a_).addmm_(g, weight) if g.is_cpu else g.mm(weight).addmm_(back, a_)
            else:
                grad_x = g.mm(weight)
            grad_x = grad_x.view(*shape, weight.shape[1])
        if need_weight:
            grad_weight = g.t().mm(_rows(x))
        if need_bias:
            grad_bias = g.sum(0)
        return grad_x, grad_z, grad_weight, grad_bias, grad_a, grad_b, None


# Calls that change nothing cost as much as small products do.


def _rows(t: Tensor) -> Tensor:
    """(..., n) as a matrix."""
    return t if t.dim() == 2 else t.reshape(-1, t.shape[-1])


def _as(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t if t.dtype == dtype else t.to(dtype)
