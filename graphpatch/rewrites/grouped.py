"""Many small products at once: rows sorted by group, each group times a matrix of its own.

Two operators that are closed under differentiation, known to the compiler as such: the loop over the groups, whose
sizes are data, is opaque to it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


@torch.library.custom_op(
    "graphpatch::grouped_mm", mutates_args=(), schema="(Tensor x, Tensor weight, Tensor ends) -> Tensor"
)
def grouped_mm(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows `ends[i-1]:ends[i]` of x (n, in) times `weight[i]` of (groups, in, out): (n, out); rows beyond are zero."""
    if has_kernel(x, weight):
        return _by_kernel(x, weight, ends)
    sizes = _sizes(ends)
    total = sum(sizes)
    out = x.new_empty(x.shape[0], weight.shape[2])
    if total < x.shape[0]:
        out[total:].zero_()
    parts = zip(x[:total].split(sizes), weight.unbind(), out[:total].split(sizes))
    for size, (rows, matrix, into) in zip(sizes, parts):
        if size:
            torch.mm(rows, matrix, out=into)
    return out


@torch.library.custom_op(
    "graphpatch::grouped_outer", mutates_args=(), schema="(Tensor x, Tensor y, Tensor ends) -> Tensor"
)
def grouped_outer(x: Tensor, y: Tensor, ends: Tensor) -> Tensor:
    """x^T y of each group's rows, for x (n, in) and y (n, out): (groups, in, out)."""
    sizes = _sizes(ends)
    total = sum(sizes)
    out = x.new_empty(len(sizes), x.shape[1], y.shape[1])
    for size, left, right, into in zip(sizes, x[:total].split(sizes), y[:total].split(sizes), out.unbind()):
        if size:
            torch.mm(left.t(), right, out=into)
        else:
            into.zero_()
    return out


@grouped_mm.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[2])


@grouped_outer.register_fake
def _(x: Tensor, y: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(ends.shape[0], x.shape[1], y.shape[1])


def _sizes(ends: Tensor) -> list[int]:
    at: list[int] = ends.tolist()
    return [end - start for start, end in zip([0, *at], at)]


# ── derivatives: each operator's is made of both ──


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    first, second, ends = inputs
    needs = ctx.needs_input_grad
    # What is frozen asks for no copy of what it was multiplied with.
    ctx.save_for_backward(first if needs[1] else None, second if needs[0] else None, ends)


def _mm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, ends = ctx.saved_tensors
    grad = grad.contiguous()
    grad_x = None if weight is None else grouped_mm(grad, weight.mT, ends)
    return grad_x, None if x is None else grouped_outer(x, grad, ends), None


def _outer_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, y, ends = ctx.saved_tensors
    grad_x = None if y is None else grouped_mm(y, grad.mT, ends)
    return grad_x, None if x is None else grouped_mm(x, grad, ends), None


grouped_mm.register_autograd(_mm_backward, setup_context=_keep)
grouped_outer.register_autograd(_outer_backward, setup_context=_keep)


# ── the kernel ──


def has_kernel(x: Tensor, weight: Tensor) -> bool:
    """Whether PyTorch's own grouped product takes these: on GPUs from compute capability 8.0, bfloat16, in strides of
    16 bytes. On a CPU it is no faster than the loop, in float32 four times as slow."""
    return (
        x.device.type == "cuda"
        and x.shape[0] > 0
        and hasattr(functional, "grouped_mm")
        and x.dtype == weight.dtype == torch.bfloat16
        and not any(size % 8 for size in (*x.shape[1:], *weight.shape[1:]))
        and x.is_contiguous()
        and (weight.is_contiguous() or weight.mT.is_contiguous())
        and torch.cuda.get_device_capability(x.device) >= (8, 0)
    )


def _by_kernel(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    out = functional.grouped_mm(x, weight, offs=ends.to(torch.int32))
    # It leaves what lies beyond the last group as it finds it.
    beyond = torch.arange(x.shape[0], device=x.device) >= ends[-1]
    return out.masked_fill_(beyond.unsqueeze(-1), 0)
