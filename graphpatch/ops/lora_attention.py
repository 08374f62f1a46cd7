"""The weights of `nn.MultiheadAttention`, and what LoRA gives to which."""

from __future__ import annotations

from collections.abc import Iterator

from .lora_shapes import Shape
from .op import Refusal, Target

ATTENTION = "torch.nn.modules.activation.MultiheadAttention"
FUSED = "graphpatch.rewrites.lora_attention:LoraAttention"
SEPARATE = "graphpatch.rewrites.lora_attention:LoraSeparateAttention"
PARTS = ("q", "k", "v", "out")


def is_separate(target: Target) -> bool:
    """Whether q, k and v have a weight each, as where keys or values have a width of their own."""
    facts = target.signature.attributes
    return facts.get("kdim") != facts.get("embed_dim") or facts.get("vdim") != facts.get("embed_dim")


def chosen_weights(parts: tuple[str, ...] | None, separate: bool) -> Iterator[tuple[str, str, tuple[int, ...] | None]]:
    """What the names of the factors begin with, the weight's own name, and which of q, k and v they are for where a
    weight has all three, and not the whole of it is meant."""
    wanted = tuple(part for part in PARTS if parts is None or part in parts)
    inside = tuple(at for at, part in enumerate("qkv") if part in wanted)
    if separate:
        for part in "qkv":
            if part in wanted:
                yield f"{part}_proj", f"{part}_proj_weight", None
    elif inside:
        yield "in_proj", "in_proj_weight", None if parts is None else inside
    if "out" in wanted:
        yield "out_proj", "out_proj.weight", None


def attention_shapes(target: Target, rank: int, parts: tuple[str, ...] | None) -> dict[str | None, tuple[Shape, Shape]]:
    """The shapes of A and B, by what their names begin with. Raises `Refusal` for parts it has not."""
    unknown = [part for part in parts or () if part not in PARTS]
    if unknown:
        raise Refusal(
            f"{target.signature.cls} has the parts {', '.join(PARTS)}, and none called `{unknown[0]}`", code="GP459"
        )
    facts = target.signature.attributes
    widths = [facts.get(name) for name in ("embed_dim", "kdim", "vdim")]
    if not all(isinstance(width, int) for width in widths):
        raise Refusal(f"{target.signature.cls} does not say its embed_dim, kdim and vdim")
    embed, keys, values = (int(width) for width in widths)  # type: ignore[arg-type]
    inputs = {"k_proj": keys, "v_proj": values}
    found: dict[str | None, tuple[Shape, Shape]] = {}
    for prefix, _, chosen in chosen_weights(parts, is_separate(target)):
        count = 1 if chosen is None else len(chosen)
        rows = embed * (count if chosen else 3 if prefix == "in_proj" else 1)
        found[prefix] = (count * rank, inputs.get(prefix, embed)), (rows, rank)
    return found
