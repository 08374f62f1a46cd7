"""An adapter under the names of another family, in PEFT's format: of a model whose rules' `map` statements say what its
weights are called there.

What a module is called there, and in which layout its rows are, say the maps that base weights load by: `linear_qkv` of
megatron-core is q, k and v, whose rows take turns, and `linear_fc1` is gate and up.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...lang.diagnostics import Diagnostic, Error
from ...ops.lora import Lora
from ...ops.lora_parts import spread_of
from ...plan.maps import Piece, restored
from ...plan.plan import Plan
from ...plan.rules import maps_in_force
from ...plan.scope import World
from ...rewrites.spread import spread
from ..mapped.layouts import changed
from ..tensors import Named, copied_out
from .keys import Adapted, adapted, peft_key
from .naming import commonest, patterns
from .plain import inexpressible

_EMBEDDINGS = frozenset(
    {"torch.nn.modules.sparse.Embedding", "megatron.core.tensor_parallel.layers.VocabParallelEmbedding"}
)


@dataclass
class _Factors:
    """An adapter of one module."""

    a: Tensor
    b: Tensor
    magnitude: Tensor | None
    scale: float
    block: int
    """Rows of A that belong together: those of one part, where it is for parts of a linear."""
    embedding: bool = False
    """Of a vocabulary, whose weight is (tokens, dim): then A is (rank, dim) and B (tokens, rank)."""


def mapped(
    plan: Plan, added: Mapping[str, Tensor], moved: Mapping[str, Tensor], world: World, base: str | None = None
) -> tuple[dict[str, Any], Named]:
    """The config and the tensors, by PEFT's keys, of the adapter whose plan and tensors these are, for the model that
    the maps of `world` read; `moved` are base weights that trained with it, and `base` is what that model is called.

    Raises `Error`: GP952 where there are no maps, or they know nothing of a module; GP625 for what PEFT cannot express.
    """
    if not maps_in_force(world):
        raise _no_maps()
    _refuse_others(plan, world)
    whole = {one.path: _factors(one, added) for one in adapted(plan)}
    if not whole:
        raise Error(Diagnostic("GP625", "this patch adds no LoRA, and an adapter of PEFT is one"))
    shapes = {f"{path}.weight": (found.b.shape[0], found.a.shape[1]) for path, found in whole.items()}
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for piece in restored(world, shapes):
        embedding = whole[piece.sources[0].removesuffix(".weight")].embedding
        for module, (a, b, magnitude, scale) in _split(piece, whole):
            if embedding:
                tensors[peft_key(module, "lora_embedding_A")] = b.t()
                tensors[peft_key(module, "lora_embedding_B")] = a.t()
            else:
                tensors[peft_key(module, "lora_A.weight")] = a
                tensors[peft_key(module, "lora_B.weight")] = b
            if magnitude is not None:
                tensors[peft_key(module, "lora_magnitude_vector")] = magnitude
            ranks[module], alphas[module] = len(a), scale * len(a)
    count = next((n for config in world.tree.configs if (n := config.get("num_moe_experts"))), 0)
    experts = _experts(ranks, alphas, count)
    dora = {found.magnitude is not None for found in whole.values()}
    if experts and True in dora:
        raise inexpressible(experts[0], "PEFT has no DoRA on experts")
    if len(dora) != 1:
        raise inexpressible(next(iter(whole)), "PEFT has DoRA on all targets or on none, and here some have it")
    tensors |= dict(_trained(moved, world, ranks, experts))
    return _config(ranks, alphas, dora.pop(), experts, base), copied_out(dict(sorted(tensors.items())))


def _no_maps() -> Error:
    fixes = (
        "`use hf_llama` in the rules, for Llama, Qwen and Mistral; gemma and gemma2 have their own",
        "or for a saved adapter: graphpatch export DIR OUT --for peft --maps hf_llama",
    )
    return Error(Diagnostic("GP952", "no rules on this model say what its weights are called elsewhere", fixes=fixes))


def _trained(
    moved: Mapping[str, Tensor], world: World, wrapped: Collection[str], experts: Collection[str]
) -> Iterator[tuple[str, Tensor]]:
    """Base weights, each by itself, where PEFT puts it into the base: below its wrapper where it has one."""
    here = {key.removeprefix("^"): tensor for key, tensor in moved.items()}
    for piece in restored(world, {key: tuple(tensor.shape) for key, tensor in here.items()}):
        if piece.sources == piece.targets:
            raise inexpressible(piece.sources[0], "it trained, and the maps do not say what it is called elsewhere")
        values = changed(piece, [here[key].detach() for key in piece.sources], back=True)
        for key, value in zip(piece.targets, values):
            path, _, name = key.rpartition(".")
            if path in experts:
                raise inexpressible(piece.sources[0], "it trained, and PEFT keeps the experts of a layer in one tensor")
            yield peft_key(f"{path}.base_layer" if path in wrapped else path, name), value


def _refuse_others(plan: Plan, world: World) -> None:
    """What else was added would be lost. Ops that add nothing, or what the other family has too, make the model that
    one."""
    for step in plan.steps:
        if isinstance(step.op, Lora) or not step.adds:
            continue
        shapes = {
            f"{plan.tree.paths[node]}.{name}".removeprefix("."): tensor.shape
            for node in step.nodes
            for name, tensor in step.adds.items()
        }
        own = next((piece.sources[0] for piece in restored(world, shapes) if piece.sources == piece.targets), None)
        if own is not None:
            raise inexpressible(own, f"PEFT knows nothing like {step.op.text()}")


def _factors(one: Adapted, added: Mapping[str, Tensor]) -> _Factors:
    extra = [name for name in one.names if name not in ("lora_A", "lora_B", "lora_magnitude")]
    if one.kind not in ("linear", "embedding") or one.op.tied or extra:
        why = f"`{extra[0]}` of {one.op.text()} is not" if extra else f"LoRA on {one.signature.cls} is not"
        raise inexpressible(one.name, f"{why} written under the names of another family")
    tensors = {name: added[key].detach() for name, key in one.names.items()}
    a, b = tensors["lora_A"], tensors["lora_B"]
    if not _EMBEDDINGS.isdisjoint(one.signature.mro):
        return _Factors(b.t(), a.t(), None, one.op.scale, one.op.rank, embedding=True)
    how = spread_of(one.op)
    b = b if how is None else spread(b, how)
    return _Factors(a, b, tensors.get("lora_magnitude"), one.op.scale, one.op.rank)


def _split(piece: Piece, whole: Mapping[str, _Factors]) -> Iterator[tuple[str, tuple[Tensor, Tensor, Any, float]]]:
    """The modules that one is elsewhere, each with its own factors."""
    if len(piece.sources) != 1 or piece.targets == piece.sources:
        raise Error(
            Diagnostic(
                "GP952",
                f"the maps do not say what `{piece.sources[0]}` is called elsewhere",
                fixes=("`map KEY -> KEY`, with the key of the Hugging Face checkpoint on the left",),
            )
        )
    found = whole[piece.sources[0].removesuffix(".weight")]
    rows = changed(piece, [found.b], back=True)
    lengths: Sequence[Any] = [None] * len(rows)
    if found.magnitude is not None:
        lengths = changed(piece, [found.magnitude], back=True)
    for target, b, magnitude in zip(piece.targets, rows, lengths):
        # Of an adapter for parts, each part has its own rows of A; what has none of them gains nothing.
        blocks = [at for at in range(0, len(found.a), found.block) if b[:, at : at + found.block].any()]
        if len(found.a) > found.block:
            if not blocks:
                continue
            chosen = torch.cat([torch.arange(at, at + found.block) for at in blocks])
            yield target.removesuffix(".weight"), (found.a[chosen], b[:, chosen], magnitude, found.scale)
        else:
            yield target.removesuffix(".weight"), (found.a, b, magnitude, found.scale)


_EXPERT = re.compile(r"(?P<layer>.*)\.experts\.(?P<number>\d+)\.(?P<kind>w[123]|(?:gate|up|down)_proj)")


def _experts(ranks: Mapping[str, int], alphas: Mapping[str, float], count: int) -> list[str]:
    """Those of the modules that are an expert's, which PEFT stacks as it loads them (`_convert_peft_config_moe` and
    `build_peft_weight_mapping` in its utils/transformers_weight_conversion.py): all of a layer, of one rank and scale,
    and gate and up with down alone. Layers have `count` experts. Raises `Error` (GP625) where they are not so."""
    found = {path: match for path in ranks if (match := _EXPERT.fullmatch(path))}
    numbers: dict[tuple[str, str], set[int]] = {}
    for match in found.values():
        numbers.setdefault((match["layer"], match["kind"]), set()).add(int(match["number"]))
    for path, match in found.items():
        layer = match["layer"]
        if numbers[layer, match["kind"]] != set(range(count)):
            raise inexpressible(path, "PEFT stacks the experts of a layer, and some of them have no adapter")
        down = "w2" if match["kind"].startswith("w") else "down_proj"
        if (layer, down) not in numbers:
            why = f"PEFT puts gate and up of experts inside down's adapter, and `{layer}.experts` has none for {down}"
            raise inexpressible(path, why)
        first = next(iter(found))
        if (ranks[path], alphas[path]) != (ranks[first], alphas[first]):
            raise inexpressible(path, "PEFT gives all experts one rank and one scale, and here they differ")
    return list(found)


def _config(
    ranks: Mapping[str, int], alphas: Mapping[str, float], dora: bool, experts: Sequence[str], base: str | None
) -> dict[str, Any]:
    # What PEFT makes of experts has the rank of no pattern.
    chosen = [experts[0]] if experts else list(ranks)
    rank, alpha = commonest(ranks[path] for path in chosen), commonest(alphas[path] for path in chosen)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(ranks),
        "rank_pattern": patterns(ranks, rank),
        "alpha_pattern": patterns(alphas, alpha),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": dora,
        "base_model_name_or_path": base,
    }
