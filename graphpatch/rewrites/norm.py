"""The two kinds of norm, in the arithmetic of Transformers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def normed(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, kind: str, eps: float | None, zero_centered: bool
) -> Tensor:
    """x (... x features) normed over as many dimensions as `weight` has, one where there is none.

    Rounded as the reference of each form rounds it: Gemma's RMS norm where zero-centred, else Llama's; torch's layer
    norm. `eps` None is the smallest step of x's dtype, as in nn.RMSNorm.
    """
    dims = 1 if weight is None else weight.dim()
    if kind == "layer":
        scale = weight if weight is None or not zero_centered else 1.0 + weight
        return F.layer_norm(x, x.shape[-dims:], scale, bias, 1e-5 if eps is None else eps)
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    over = tuple(range(-dims, 0))
    wide = x.double() if x.dtype == torch.float64 else x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(over if dims > 1 else -1, keepdim=True) + eps)
    if weight is None:
        y = wide.type_as(x)
    elif zero_centered:
        y = (wide * (1.0 + weight.to(wide.dtype))).type_as(x)
    else:
        y = weight * wide.to(x.dtype)
    return y if bias is None else y + bias


class Norm(nn.Module):
    """A norm that an op adds: `weight` (features). It gives its input's dtype."""

    def __init__(self, dim: int, kind: str, eps: float, zero_centered: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.kind, self.eps, self.zero_centered = kind, eps, zero_centered

    def forward(self, x: Tensor) -> Tensor:
        return normed(x, self.weight, None, self.kind, self.eps, self.zero_centered).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, {self.kind}, eps={self.eps}, zero_centered={self.zero_centered}"


def fill_norms(weights: Mapping[str, Tensor], zero_centered: bool) -> None:
    """Such that an untrained norm only normalises."""
    for weight in weights.values():
        weight.fill_(0.0 if zero_centered else 1.0)
