"""What LoRA's factors start from, by the names that the op's `init` takes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Start = Callable[[Tensor, Tensor, float, Callable[[], Tensor], "int | None"], None]
"""Fills A (rank, in) and B (out, rank) in place, given the scale, the weight (out, in), made when called, and a number
of iterations. A convolution's factors have their kernel's dimensions behind those."""


def kaiming(a: Tensor, b: Tensor, scale: float, weight: Callable[[], Tensor], iterations: int | None) -> None:
    """A kaiming uniform with a = sqrt(5), which is uniform in +-1/sqrt(fan-in), as `nn.Linear` has it; B zero."""
    bound = (a.numel() / a.shape[0]) ** -0.5
    a.uniform_(-bound, bound)
    b.zero_()


def gaussian(a: Tensor, b: Tensor, scale: float, weight: Callable[[], Tensor], iterations: int | None) -> None:
    """A normal with a deviation of 1/rank; B zero."""
    a.normal_(std=1 / a.shape[0])
    b.zero_()


def pissa(a: Tensor, b: Tensor, scale: float, weight: Callable[[], Tensor], iterations: int | None) -> None:
    """The weight's principal part: of W = U S V^T the first columns, scale * B A = U_r S_r V_r^T, S shared evenly.

    Meng et al., PiSSA, arXiv:2404.02948, section 3. With `iterations`, by so many of a randomised subspace iteration
    (Halko et al., arXiv:0909.4061, algorithm 4.4), which costs a fraction of a full decomposition.
    """
    rank, matrix = a.shape[0], _full(weight())
    if iterations is None:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    else:
        # A few directions more than are kept, section 4.2 there.
        left, values, basis = torch.svd_lowrank(matrix, q=min(rank + 8, *matrix.shape), niter=iterations)
        right = basis.mT
    root = (values[:rank] / scale).sqrt()
    a.copy_(root[:, None] * right[:rank])
    b.copy_(left[:, :rank] * root)


def olora(a: Tensor, b: Tensor, scale: float, weight: Callable[[], Tensor], iterations: int | None) -> None:
    """B the first columns of Q and A the first rows of R, of W = Q R. Büyükakyüz, OLoRA, arXiv:2406.01775."""
    rank = a.shape[0]
    q, r = torch.linalg.qr(_full(weight()))
    a.copy_(r[:rank])
    b.copy_(q[:, :rank])


def orthogonal(a: Tensor, b: Tensor, scale: float, weight: Callable[[], Tensor], iterations: int | None) -> None:
    """Both random, with B A = 0: the rows of one orthogonal matrix are shared out between them, as PEFT does
    (https://datta0.github.io/posts/rethink-lora-init). Of A^T and B, each has half the rank."""
    rank = a.shape[0]
    like = {"device": a.device, "dtype": torch.float32}
    q, _ = torch.linalg.qr(torch.randn(rank, rank, **like))  # type: ignore[call-overload]
    half = rank // 2
    a.copy_((torch.randn(a.shape[1], half, **like) @ q[0::2]).mT / 10)  # type: ignore[call-overload]
    b.copy_(torch.randn(b.shape[0], half, **like) @ q[1::2] / 10)  # type: ignore[call-overload]


def _full(weight: Tensor) -> Tensor:
    """In the precision that decompositions are made in."""
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))


STARTS: dict[str, Start] = {
    "kaiming": kaiming,
    "gaussian": gaussian,
    "pissa": pissa,
    "olora": olora,
    "orthogonal": orthogonal,
    # Of A; the rows that data give stand there afterwards (patch/observe.py).
    "eva": kaiming,
    # Of both; what quantising took from the weight gives others, once it is known (patch/approach.py).
    "loftq": kaiming,
}
