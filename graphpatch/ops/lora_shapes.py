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
    out, in_ = _sizes(signature, "out_features", "in_features") or _matrix(signature)
    return (rank, in_), (out, rank)


def conv1d(signature: Signature, rank: int) -> tuple[Shape, Shape]:
    """The `Conv1D` of Transformers: nx features in, nf out, and the weight (in, out)."""
    out, in_ = _sizes(signature, "nf", "nx") or _matrix(signature)[::-1]
    return (rank, in_), (out, rank)


def embedding(signature: Signature, rank: int) -> tuple[Shape, Shape]:
    """E is (vocabulary, dim) and gains (B A)^T."""
    dim, vocabulary = _sizes(signature, "embedding_dim", "num_embeddings") or _matrix(signature)[::-1]
    if signature.attributes.get("max_norm") is not None:
        raise Refusal(
            f"{signature.cls} has a max_norm, so each call shortens rows of its weight in place: no frozen base",
            "renormalise once, then build it without max_norm",
        )
    if signature.attributes.get("sparse") is True:
        raise Refusal(
            f"{signature.cls} has sparse gradients, and PyTorch can transpose none into those of lora_A",
            "build it with sparse=False: a frozen weight has no gradient to keep sparse",
        )
    return (rank, vocabulary), (dim, rank)


def vocab_parallel(signature: Signature, rank: int) -> tuple[Shape, Shape]:
    """The `VocabParallelEmbedding` of megatron-core, whose weight is this rank's part of the vocabulary."""
    vocabulary, dim = _matrix(signature)
    return (rank, vocabulary), (dim, rank)


def column_parallel(signature: Signature, rank: int) -> tuple[Shape, Shape]:
    """The `ColumnParallelLinear` of megatron-core, whose weight is this rank's part of the rows."""
    if "weight" not in signature.parameters:
        raise Refusal(
            "it has no weight of its own: it computes with the embedding's (share_embeddings_and_output_weights), and "
            "an update of one use alone would part them",
            "leave it out: except output_layer",
            "or build the model with share_embeddings_and_output_weights=False",
            code="GP424",
        )
    return linear(signature, rank)


def grouped(signature: Signature, rank: int) -> tuple[Shape, Shape]:
    """The grouped linears of Transformer Engine: one weight an expert, `weight0`, `weight1` and so on, each this rank's
    part."""
    weights = [t.shape for name, t in signature.parameters.items() if name[:6] == "weight" and name[6:].isdigit()]
    if not weights or len(set(weights)) > 1 or len(weights[0]) != 2:
        raise Refusal(f"{signature.cls} has no weight0, weight1 ..., one an expert, all of one shape")
    out, in_ = weights[0]
    return (len(weights), rank, in_), (len(weights), out, rank)


def convolution(signature: Signature, rank: int) -> tuple[Shape, Shape]:
    """A is a weight like the base's with rank channels out; B one of size 1. Groups split the rank among them."""
    facts = signature.attributes
    kernel, groups = facts.get("kernel_size"), facts.get("groups")
    sizes = _sizes(signature, "out_channels", "in_channels")
    if sizes is None or not isinstance(kernel, tuple) or not isinstance(groups, int):
        raise Refusal(f"{signature.cls} does not say its channels, kernel_size and groups")
    if rank % groups:
        raise Refusal(
            f"{signature.cls} has {groups} groups, which split the rank among them, and {rank} is no multiple of that",
            f"lora(rank={groups}), or another multiple",
            "or leave it out: where groups == 1",
        )
    out, in_ = sizes
    size: Shape = tuple(kernel)  # type: ignore[arg-type]
    return (rank, in_ // groups, *size), (out, rank // groups, *(1 for _ in size))


def transposed_convolution(signature: Signature, rank: int) -> tuple[Shape, Shape]:
    """The weight is stored (in, out / groups, kernel), and A like it; B is a convolution's."""
    (_, _, *size), b = convolution(signature, rank)
    return (int(signature.attributes["in_channels"]), b[1], *size), b  # type: ignore[arg-type]


KINDS: dict[str, Callable[[Signature, int], tuple[Shape, Shape]]] = {
    "transformers.pytorch_utils.Conv1D": conv1d,
    "torch.nn.modules.sparse.Embedding": embedding,
    "torch.nn.modules.conv.Conv1d": convolution,
    "torch.nn.modules.conv.Conv2d": convolution,
    "torch.nn.modules.conv.Conv3d": convolution,
    "torch.nn.modules.conv.ConvTranspose1d": transposed_convolution,
    "torch.nn.modules.conv.ConvTranspose2d": transposed_convolution,
    "torch.nn.modules.conv.ConvTranspose3d": transposed_convolution,
    "megatron.core.tensor_parallel.layers.VocabParallelEmbedding": vocab_parallel,
    "megatron.core.tensor_parallel.layers.ColumnParallelLinear": column_parallel,
    "megatron.core.extensions.transformer_engine.TEGroupedLinear": grouped,
}
"""By qualified class name; the first of a target's MRO that stands here decides."""

EXACT = frozenset({"torch.nn.modules.activation.MultiheadAttention"}) | frozenset(
    name for name, kind in KINDS.items() if kind in (embedding, convolution, transposed_convolution)
)
"""Those whose subclasses are refused, since they may use their input otherwise."""


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
