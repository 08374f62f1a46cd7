"""Several low-rank updates as one: the sum, exact or pruned, as a new pair of factors.

An update is w s B A, of one matrix or of a stack of them: A is (stack, rank, in) and B (stack, out, rank), s the scale
it has and w the weight that the caller gives it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Prune = Callable[[Tensor], Tensor]
Majority = Literal["total", "frequency"]


class Update(NamedTuple):
    """weight scale B A."""

    a: Tensor
    b: Tensor
    scale: float
    weight: float

    @property
    def factor(self) -> float:
        return self.weight * self.scale


class Method(NamedTuple):
    """How updates become one: what is pruned away of each, and how what is left is put together."""

    prune: Literal["", "magnitude", "random"] = ""
    elects: bool = False
    """Values that disagree with the elected sign are left out, and the rest averaged: TIES."""
    dense: bool = False
    """On the product B A, brought back to low rank by its largest singular values; else on A and on B apart."""


METHODS = {
    "cat": Method(),
    "linear": Method(),
    "svd": Method(dense=True),
    "magnitude_prune": Method("magnitude"),
    "magnitude_prune_svd": Method("magnitude", dense=True),
    "ties": Method("magnitude", elects=True),
    "ties_svd": Method("magnitude", elects=True, dense=True),
    "dare_linear": Method("random"),
    "dare_linear_svd": Method("random", dense=True),
    "dare_ties": Method("random", elects=True),
    "dare_ties_svd": Method("random", elects=True, dense=True),
}
"""As `add_weighted_adapter` of PEFT 0.21 has them. TIES: Yadav et al., arXiv:2306.01708, section 4. DARE: Yu et al.,
arXiv:2311.03099, section 3."""


def concatenated(updates: Sequence[Update]) -> tuple[Tensor, Tensor]:
    """Their sum exactly: the ranks one after the other."""
    return torch.cat([u.a * u.factor for u in updates], 1), torch.cat([u.b for u in updates], 2)


def on_factors(updates: Sequence[Update], method: Method, prune: Prune, majority: Majority) -> tuple[Tensor, Tensor]:
    """A and B put together apart, for updates of one rank. The factor is shared between both, its sign A's."""
    roots = [math.sqrt(abs(u.factor)) for u in updates]
    signed = [math.copysign(root, u.factor) for root, u in zip(roots, updates)]
    a = _mixed([u.a for u in updates], signed, method, prune, majority)
    return a, _mixed([u.b for u in updates], roots, method, prune, majority)


def on_products(
    updates: Sequence[Update], rank: int, method: Method, prune: Prune, majority: Majority
) -> tuple[Tensor, Tensor]:
    """The products put together, and the nearest of that rank (Eckart and Young): its singular vectors, the values at
    B's; zeros where the rank is more than there are."""
    if method.prune:
        # Signs are elected among what the adapters add, before the caller's weights.
        deltas = [(u.b @ u.a) * u.scale for u in updates]
        mixed = _mixed(deltas, [u.weight for u in updates], method, prune, majority)
        left, values, right = torch.linalg.svd(mixed, full_matrices=False)
    else:
        left, values, right = _svd_of_product(*concatenated(updates))
    kept = min(rank, values.shape[-1])
    a = right.new_zeros(len(right), rank, right.shape[-1])
    b = left.new_zeros(len(left), left.shape[1], rank)
    a[:, :kept], b[:, :, :kept] = right[:, :kept], left[:, :, :kept] * values[:, None, :kept]
    return a, b


def _svd_of_product(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Singular values and vectors of B A, by those of a matrix no larger than its rank."""
    left, core = torch.linalg.qr(b)
    right, edge = torch.linalg.qr(a.mT)
    u, values, v = torch.linalg.svd(core @ edge.mT, full_matrices=False)
    return left @ u, values, v @ right.mT


def _mixed(
    tensors: Sequence[Tensor], weights: Sequence[float], method: Method, prune: Prune, majority: Majority
) -> Tensor:
    kept = torch.stack([prune(t) for t in tensors])
    weighted = kept * torch.tensor(weights, dtype=kept.dtype, device=kept.device).view(-1, 1, 1, 1)
    if not method.elects:
        return weighted.sum(0)
    sign = kept.sign()
    elected = torch.where((kept if majority == "total" else sign).sum(0) >= 0, 1.0, -1.0)
    agree = sign == elected
    return (weighted * agree).sum(0) / agree.sum(0).clamp(min=1)


# ── pruning ──


def largest(density: float) -> Prune:
    """Keep that share of the values, those of the largest magnitude."""

    def prune(tensor: Tensor) -> Tensor:
        flat = tensor.reshape(-1)
        kept = flat.abs().topk(int(density * flat.numel())).indices
        return torch.zeros_like(flat).index_copy_(0, kept, flat[kept]).view(tensor.shape)

    return prune


def at_random(density: float, generators: Callable[[torch.device], torch.Generator | None]) -> Prune:
    """Keep each value with that probability, divided by it, so that its expectation stays."""

    def prune(tensor: Tensor) -> Tensor:
        chance = torch.full_like(tensor, density)
        return tensor * torch.bernoulli(chance, generator=generators(tensor.device)) / density

    return prune
