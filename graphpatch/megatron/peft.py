"""An adapter that was trained over ranks, under Hugging Face names and in PEFT's format.

What a module is called there, and in which layout its rows are, say the `map` statements that base weights load by:
`linear_qkv` is q, k and v, whose rows take turns, and `linear_fc1` is gate and up.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.mapped.layouts import changed
from ..checkpoint.mapped.load import world_of
from ..checkpoint.peft.files import write_files
from ..checkpoint.peft.keys import peft_key
from ..checkpoint.peft.naming import commonest, patterns
from ..checkpoint.peft.plain import inexpressible
from ..lang.diagnostics import Diagnostic, Error
from ..patch.patch import Patch, patches
from ..patch.record import record_of
from ..plan.maps import Piece, restored
from ..plan.rules import maps_in_force
from ..plan.scope import World
from ..rewrites.lora_base import Adapter
from ..rewrites.spread import spread
from ..tree.tree import Tree
from .lora import LoraParallel
from .lora_embedding import LoraVocabParallelEmbedding
from .ranks import all_or_none, rank, told
from .sharding import row_stride, whole_of
from .whole import expert_rank, numbered


@dataclass
class _Factors:
    """A whole adapter of one module, on the CPU."""

    a: Tensor
    b: Tensor
    magnitude: Tensor | None
    scale: float
    block: int
    """Rows of A that belong together: those of one part, where it is for parts of a linear."""
    embedding: bool = False
    """Of a vocabulary, whose weight is (tokens, dim): then A is (rank, dim) and B (tokens, rank)."""


def to_peft(patch: Patch | Sequence[Patch], directory: str | PathLike[str]) -> None:
    """Write the adapter that `patch` (or the patches of virtual chunks) added, as PEFT writes one, for the Hugging Face
    model that the model's `map` statements read. Called on every rank; the first writes.

    Raises `Error` on all ranks: GP952 where no rules on the model have maps, or they know nothing of a module; GP625
    for what PEFT cannot express; GP604 where the files cannot be written.
    """
    parts = [patch] if isinstance(patch, Patch) else list(patch)
    here = {path: found for part in parts for path, found in _of(part)}
    all_or_none(lambda: _write(_united(told(here)), _maps(parts), Path(directory)))


def _of(patch: Patch) -> Iterator[tuple[str, _Factors]]:
    tree = Tree.of(patch.model, as_patched=True)
    paths = dict(zip(tree.paths, numbered(tree, expert_rank()).paths))
    own = {change.mark.op for change in patch._journal.changes}
    for path, module in patch.model.named_modules():
        for held in record_of(module).held:
            if isinstance(held.entry, Adapter) and held.entry.text in own:
                yield paths[path], _whole(module, held.entry, paths[path])


def _whole(module: nn.Module, entry: Adapter, path: str) -> _Factors:
    if isinstance(module, LoraVocabParallelEmbedding):
        tokens = whole_of(module, getattr(module, entry.a), 1)
        b = getattr(module, entry.b).detach().t()
        return _Factors(b.cpu(), tokens.t().cpu(), None, entry.scale, entry.rank, embedding=True)
    if not isinstance(module, LoraParallel):
        raise inexpressible(path, f"{type(module).__name__} is not exported from ranks")
    if entry.bias:
        raise inexpressible(path, "its B has a bias, which PEFT has on all targets or on none")
    a, b = getattr(module, entry.a), getattr(module, entry.b)
    magnitude = getattr(module, entry.magnitude) if entry.magnitude else None
    if module.input_dim is None:
        # Rows of a part alone become rows of the linear first: these are shared out as its own are.
        b = b if entry.spread is None else spread(b, entry.spread)
        stride = row_stride(module)
        b = whole_of(module, b, 0, stride)
        magnitude = None if magnitude is None else whole_of(module, magnitude, 0, stride)
    else:
        a = whole_of(module, a, module.input_dim)
    lengths = None if magnitude is None else magnitude.detach().cpu()
    return _Factors(a.detach().cpu(), b.detach().cpu(), lengths, entry.scale, entry.rank)


def _united(said: Sequence[Mapping[str, _Factors]]) -> dict[str, _Factors]:
    return {path: found for rank_said in said for path, found in rank_said.items()}


def _maps(parts: Sequence[Patch]) -> World:
    worlds = (world_of(on) for part in parts for on in patches(part.model))
    found = next((world for world in worlds if maps_in_force(world)), None)
    if found is None:
        fix = "`use hf_llama` in the rules, for Llama, Qwen and Mistral; gemma and gemma2 have their own"
        raise Error(
            Diagnostic("GP952", "no rules on this model say what its weights are called elsewhere", fixes=(fix,))
        )
    return found


def _write(whole: Mapping[str, _Factors], world: World, folder: Path) -> None:
    shapes = {f"{path}.weight": (found.b.shape[0], found.a.shape[1]) for path, found in whole.items()}
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for piece in restored(world, shapes):
        embedding = whole[piece.sources[0].removesuffix(".weight")].embedding
        for module, (a, b, magnitude, scale) in _split(piece, whole):
            if embedding:
                tensors[peft_key(module, "lora_embedding_A")] = b.t().contiguous()
                tensors[peft_key(module, "lora_embedding_B")] = a.t().contiguous()
            else:
                tensors[peft_key(module, "lora_A.weight")] = a.clone()
                tensors[peft_key(module, "lora_B.weight")] = b.clone()
            if magnitude is not None:
                tensors[peft_key(module, "lora_magnitude_vector")] = magnitude.clone()
            ranks[module], alphas[module] = len(a), scale * len(a)
    count = next((n for config in world.tree.configs if (n := config.get("num_moe_experts"))), 0)
    experts = _experts(ranks, alphas, count)
    dora = {found.magnitude is not None for found in whole.values()}
    if experts and True in dora:
        raise inexpressible(experts[0], "PEFT has no DoRA on experts")
    if len(dora) != 1:
        raise inexpressible(next(iter(whole), "^"), "PEFT has DoRA on all targets or on none, and here some have it")
    if rank() == 0:
        write_files(folder, _config(ranks, alphas, dora.pop(), experts), dict(sorted(tensors.items())))


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


def _config(
    ranks: Mapping[str, int], alphas: Mapping[str, float], dora: bool, experts: Sequence[str]
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
        "base_model_name_or_path": None,
    }
