"""The shapes of LoRA's factors on each kind of module, from what a tree knows of it."""

from __future__ import annotations

from collections.abc import Callable

from ..tree.tree import Signature
from .op import Refusal

Shape = tuple[int, ...]


def factor_shapes(signature: Signature, rank: int) -> tuple[Shape, Shape]:
    """The shapes of A and B; those of a linear for a class that `KINDS` has none of.

    Raises `Refusal` where there is no low-rank update of that rank.
    """
    kind = next((KINDS[name] for name in signature.mro if name in KINDS), linear)
    return kind(signature, rank)


def linear(signature: Signature, rank: int) -> tuple[Shape, Shape]:
    """Attributes first: a packed 4-bit weight has another shape, a parametrised one is absent."""
    sizes = _sizes(signature, "out_features", "in_features")
    if sizes is None:
        sizes = _matrix(signature)
    out, in_ = sizes
    return (rank, in_), (out, rank)


def conv1d(signature: Signature, rank: int) -> tuple[Shape, Shape]:
    """The `Conv1D` of Transformers: nx features in, nf out, and the weight (in, out)."""
    sizes = _sizes(signature, "nf", "nx")
    if sizes is None:
        sizes = _matrix(signature)[::-1]
    out, in_ = sizes
    return (rank, in_), (out, rank)


KINDS: dict[str, Callable[[Signature, int], tuple[Shape, Shape]]] = {
    "transformers.pytorch_utils.Conv1D": conv1d,
}
"""By qualified class name; the first of a target's MRO that stands here decides."""


def _sizes(signature: Signature, *names: str) -> Shape | None:
    """The attributes of these names, where all are positive integers."""
    sizes = tuple(signature.attributes.get(name) for name in names)
    return sizes if all(isinstance(s, int) and s > 0 for s in sizes) else None  # type: ignore[operator,return-value]


def _matrix(signature: Signature) -> Shape:
    weight = signature.parameters.get("weight")
    if weight is None or len(weight.shape) != 2 or 0 in weight.shape:
        has = f"one of shape {list(weight.shape)}" if weight else "none"
        raise Refusal(f"lora needs a weight of two dimensions, and {signature.cls} has {has}")
    return weight.shape
