"""Linears that are several in one, q, k and v say: which rows of the weight are whose.

Known by the class around the linear and its name there, or said by the rule; never guessed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from .lora_shapes import factor_shapes
from .op import Refusal, Target

if TYPE_CHECKING:
    from .lora import Lora


class Layout(NamedTuple):
    """The rows are `groups` times: so many of the first part, of the second, and so on."""

    parts: tuple[tuple[str, int], ...]
    groups: int = 1

    @property
    def rows(self) -> int:
        return self.groups * sum(size for _, size in self.parts)


class Spread(NamedTuple):
    """Where the rows of a B stacked by part belong."""

    groups: int
    sizes: tuple[int, ...]
    """Rows of each part in a group, of those that gain nothing too."""
    chosen: tuple[int, ...]
    """The parts that gain something."""
    rank: int
    """Of each."""


def spread_of(lora: Lora) -> Spread | None:
    """Of an op whose layout is known."""
    if lora.parts is None or lora.layout is None:
        return None
    names = [name for name, _ in lora.layout]
    sizes = tuple(size for _, size in lora.layout)
    return Spread(lora.groups or 1, sizes, tuple(names.index(part) for part in lora.parts), lora.rank)


def with_layout(lora: Lora, target: Target) -> Lora:
    """The op, with the layout that this target has, and its parts in that order. Raises `Refusal` (GP459)."""
    assert lora.parts is not None
    (_, *_), (out, *_) = factor_shapes(target.signature, lora.rank)
    where = f"{target.path.rpartition('.')[2]} of {target.parent.cls}" if target.parent else target.path or "^"
    if lora.layout is not None:
        layout = Layout(lora.layout, lora.groups or 1)
        if layout.rows != out:
            raise Refusal(
                f"the layout has {layout.rows} rows, and {where} has {out}",
                "layout: the rows of each part, in their order; with groups=n, those in one of n groups",
                code="GP459",
            )
    else:
        found = _known(target, out)
        if found is None or found.rows != out:
            raise Refusal(
                f"which rows of {where} are whose is not known",
                f'say it: parts=["q"], layout=[["q", {out - out // 3 * 2}], ["k", {out // 3}], ["v", {out // 3}]], say',
                "where the parts take turns, head by head, with the rows of one head and groups=heads",
                code="GP459",
            )
        layout = found
    names = [name for name, _ in layout.parts]
    unknown = [part for part in lora.parts if part not in names]
    if unknown:
        raise Refusal(f"{where} has the parts {', '.join(names)}, and none called `{unknown[0]}`", code="GP459")
    parts = tuple(name for name in names if name in lora.parts)
    return lora.model_copy(update={"parts": parts, "layout": layout.parts, "groups": layout.groups})


def _known(target: Target, out: int) -> Layout | None:
    child = target.path.rpartition(".")[2]
    # Somebody's own subclass may split otherwise.
    known = ("transformers.models.", "megatron.core.transformer.")
    theirs = [c for c in target.parent.mro if c.startswith(known)] if target.parent else []
    if target.parent is None or target.parent.mro[:1] != tuple(theirs[:1]):
        return None
    rule = next((FUSED[pair] for c in theirs if (pair := (c.rpartition(".")[2], child)) in FUSED), None)
    return None if rule is None else rule(target, out)


Rule = Callable[[Target, int], "Layout | None"]
QKV, GATE_UP = ("q", "k", "v"), ("gate", "up")


def _number(target: Target, *names: str) -> int | None:
    """The first that the module around the linear has, or the config around that."""
    assert target.parent is not None
    for table in (target.parent.attributes, target.config or {}):
        for name in names:
            value = table.get(name)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def _true(target: Target, name: str) -> bool:
    assert target.parent is not None
    return bool(target.parent.attributes.get(name, (target.config or {}).get(name)))


def _even(*names: str) -> Rule:
    """One after the other, equally large."""
    return lambda target, out: Layout(tuple((name, out // len(names)) for name in names))


def _heads(*names: str) -> Rule:
    """In turns, head by head."""

    def rule(target: Target, out: int) -> Layout | None:
        heads = _number(target, "num_heads", "num_attention_heads", "n_head")
        return heads and Layout(tuple((name, out // heads // len(names)) for name in names), heads)  # type: ignore[return-value]

    return rule


def _shared_keys(target: Target, out: int) -> Layout | None:
    """One after the other, with fewer heads of keys and values than of queries."""
    heads, shared = _number(target, "num_heads", "num_attention_heads"), _number(target, "num_key_value_heads")
    if heads is None or shared is None:
        return None
    size = out // (heads + 2 * shared)
    return Layout((("q", heads * size), ("k", shared * size), ("v", shared * size)))


def _gpt2(target: Target, out: int) -> Layout | None:
    """Of a cross-attention the keys and values alone."""
    return _even("k", "v")(target, out) if _true(target, "is_cross_attention") else _even(*QKV)(target, out)


def _bigcode(target: Target, out: int) -> Layout | None:
    if _true(target, "is_cross_attention"):
        return None
    if not _true(target, "multi_query"):
        return _heads(*QKV)(target, out)
    embed, size = _number(target, "embed_dim"), _number(target, "head_dim")
    return embed and size and Layout((("q", embed), ("k", size), ("v", size)))  # type: ignore[return-value]


def _falcon(target: Target, out: int) -> Layout | None:
    heads, shared, size = (_number(target, name) for name in ("num_heads", "num_kv_heads", "head_dim"))
    if heads is None or size is None:
        return None
    if _true(target, "new_decoder_architecture"):
        return shared and Layout((("q", heads // shared * size), ("k", size), ("v", size)), shared)  # type: ignore[return-value]
    if _true(target, "multi_query"):
        return Layout((("q", heads * size), ("k", size), ("v", size)))
    return _heads(*QKV)(target, out)


def _codegen(target: Target, out: int) -> Layout | None:
    """Four groups, from the days of its training on TPUs, with the values before the keys."""
    return Layout(tuple((name, out // 12) for name in ("q", "v", "k")), 4)


def _megatron(target: Target, out: int) -> Layout | None:
    """This rank's groups of queries, each with its keys and values."""
    names = ("num_attention_heads_per_partition", "num_query_groups_per_partition", "hidden_size_per_attention_head")
    heads, groups, size = (_number(target, name) for name in names)
    if heads is None or groups is None or size is None:
        return None
    return Layout((("q", heads // groups * size), ("k", size), ("v", size)), groups)


def _megatron_gated(target: Target, out: int) -> Layout | None:
    """This rank's part of either."""
    return _even(*GATE_UP)(target, out) if _true(target, "gated_linear_unit") else None


FUSED: dict[tuple[str, str], Rule] = {
    **dict.fromkeys([(f"{x}Attention", "c_attn") for x in ("GPT2", "DecisionTransformerGPT2", "ImageGPT")], _gpt2),
    ("GPTBigCodeAttention", "c_attn"): _bigcode,
    ("FalconAttention", "query_key_value"): _falcon,
    ("CodeGenAttention", "qkv_proj"): _codegen,
    ("DbrxAttention", "Wqkv"): _shared_keys,
    **{(f"{x}Attention", "qkv_proj"): _shared_keys for x in ("Phi3", "Phi4Multimodal")},
    **{(f"{x}Attention", "query_key_value"): _heads(*QKV) for x in ("GPTNeoX", "Bloom", "Persimmon")},
    ("ModernBertAttention", "Wqkv"): _even(*QKV),
    ("MptAttention", "Wqkv"): _even(*QKV),
    ("BarkSelfAttention", "att_proj"): _even(*QKV),
    **{
        (f"{x}VisionAttention", "qkv"): _even(*QKV)
        for x in ("", "Qwen2_5_VL", "Qwen3VL", "Qwen3VLMoe", "Glm4v", "Glm4vMoe")
    },
    **{(f"{x}Attention", "qkv"): _even(*QKV) for x in ("Blip", "Blip2", "InstructBlip")},
    **{(f"{x}MLP", "gate_up_proj"): _even(*GATE_UP) for x in ("Phi3", "Phi4Multimodal", "Glm", "Glm4", "Dia")},
    ("ModernBertMLP", "Wi"): _even("gate", "up"),
    ("SelfAttention", "linear_qkv"): _megatron,
    **{(cls, "linear_fc1"): _megatron_gated for cls in ("MLP", "SharedExpertMLP")},
}
"""By the class around the linear, of Transformers or megatron-core, and the linear's name there.

ModernBERT activates the first half."""
