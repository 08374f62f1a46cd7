"""Experts one by one: adapters made before Transformers stacked them, and those that servers read.

The keys are `mlp.experts.3.gate_proj.lora_A.weight`, or by older names `block_sparse_moe.experts.3.w1...`; the model
has `mlp.experts.gate_up_proj` and `mlp.experts.down_proj`, one matrix an expert. Gate and up are one matrix there, so
their factors become one pair: the A's one above the other, the B's side by side in their own rows. Where gate and up
share their A, which is how a pair of a stack is told expert by expert, it stays one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch.nn.functional import pad

from ...lang.diagnostics import Diagnostic, Error
from ...tree.tree import Tree
from .config import LoraConfig
from .keys import PREFIX
from .names import Named, of_name

Tensors = dict[str, torch.Tensor]
_KEY = re.compile(r"(?P<block>.*)\.experts\.(?P<number>\d+)\.(?P<name>\w+)\.lora_(?P<side>[AB])\.weight")
_ROLES = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down"}
_STACKS = {"gate_up_proj": ("gate", "up"), "up_proj": ("up",), "down_proj": ("down",)}


class Fused(NamedTuple):
    tensors: Tensors
    """By canonical key, in PEFT's layout of stacks."""
    parameters: list[Named]


class _Pair(NamedTuple):
    """The factors of one projection of one expert."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float


_Experts = dict[tuple[str, int], dict[str, tuple[str, torch.Tensor]]]
"""By role and number, and A or B: the name of the projection, and the tensor."""


def fused(config: LoraConfig, tensors: Mapping[str, torch.Tensor], tree: Tree, what: str) -> Fused | None:
    """The tensors, with what belongs to single experts stacked as this model has them; None where none does.

    Raises `Error` (GP623) where some experts of a stack have factors and others not.
    """
    found: dict[str, _Experts] = {}
    rest: Tensors = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key.removeprefix(PREFIX))
        path = match and match["name"] in _ROLES and _stacked(tree, match["block"], int(match["number"]))
        if match and path:
            expert = found.setdefault(path, {}).setdefault((_ROLES[match["name"]], int(match["number"])), {})
            expert[match["side"]] = (f"{match['block']}.experts.{match['number']}.{match['name']}", tensor)
        else:
            rest[key] = tensor
    parameters: list[Named] = []
    for path, experts in found.items():
        node = tree.find(path)
        assert node is not None
        shapes = {n: t.shape for n, t in tree.signature(node).parameters.items() if n in _STACKS and len(t.shape) == 3}
        stacks = [name for name in shapes if any(role in _STACKS[name] for role, _ in experts)]
        for behind, name in enumerate(reversed(stacks)):
            count, out, in_ = shapes[name]
            pairs = list(_pairs(config, experts, _STACKS[name], count, f"{path}.{name}", what))
            _check(pairs, out // len(_STACKS[name]), in_, f"{path}.{name}", what)
            a, b, scale = _stack(pairs, _STACKS[name], out)
            stem = PREFIX + path + ".base_layer" * behind
            rest[f"{stem}.lora_A.weight"] = a.flatten(0, 1)
            rest[f"{stem}.lora_B.weight"] = b.permute(1, 2, 0).flatten(1)
            rank = a.shape[1]
            parameters.append(Named(f"{path}.{name}", rank, scale * (rank**0.5 if config.use_rslora else rank)))
    return Fused(rest, parameters) if found else None


def _stacked(tree: Tree, block: str, number: int) -> str | None:
    """The path of the module that holds the stacks in which this expert is."""
    for path in (f"{block}.experts", f"{block.removesuffix('block_sparse_moe')}mlp.experts"):
        node = tree.find(path)
        if node is not None and tree.find(f"{path}.{number}") is None:
            facts = tree.signature(node)
            if any(n in _STACKS for n in facts.parameters) and not facts.attributes.get("is_transposed"):
                return path
    return None


def _pairs(
    config: LoraConfig, experts: _Experts, roles: tuple[str, ...], count: int, stack: str, what: str
) -> Iterator[dict[str, _Pair]]:
    """Of each expert the factors of the projections that this stack holds, by their roles."""
    present = [role for role in roles if any(role == other for other, _ in experts)]
    for number in range(count):
        pairs: dict[str, _Pair] = {}
        for role in present:
            held = experts.get((role, number), {})
            if held.keys() != {"A", "B"}:
                title = f"of `{stack}` expert {number} has no {role} projection with both factors"
                why = "the experts of a layer are one tensor here, so all of them have an adapter, or none has"
                raise Error(Diagnostic("GP623", f"{what} does not fit this model: {title}", text=(why,)))
            one = of_name(config, held["A"][0])
            scale = one.alpha / (one.rank**0.5 if config.use_rslora else one.rank)
            pairs[role] = _Pair(held["A"][1], held["B"][1], scale)
        yield pairs


def _check(experts: Sequence[Mapping[str, _Pair]], out: int, in_: int, stack: str, what: str) -> None:
    for number, pairs in enumerate(experts):
        for role, (a, b, _) in pairs.items():
            fit = a.dim() == b.dim() == 2 and (b.shape[0], a.shape[1], a.shape[0]) == (out, in_, b.shape[1])
            if not fit or not (a.is_floating_point() and b.is_floating_point()):
                title = f"the {role} projection of expert {number} of `{stack}` has another shape or type in {what}"
                why = f"A {list(a.shape)} and B {list(b.shape)}; here it is {out} x {in_}"
                raise Error(Diagnostic("GP624", title, text=(why,)))


def _stack(
    experts: Sequence[Mapping[str, _Pair]], roles: tuple[str, ...], out: int
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """A (experts, rank, in), B (experts, out, rank) and the scale, which is that of the first pair; what others have
    more or less is in their B."""
    scale = next((pair.scale for pairs in experts for pair in pairs.values() if pair.scale), 0.0)
    made = [_one(pairs, roles, out // len(roles), scale) for pairs in experts]
    rank = max(a.shape[0] for a, _ in made)
    a = torch.stack([pad(a, (0, 0, 0, rank - a.shape[0])) for a, _ in made])
    return a, torch.stack([pad(b, (0, rank - b.shape[1])) for _, b in made]), scale


def _one(
    pairs: Mapping[str, _Pair], roles: tuple[str, ...], rows: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors of one expert: of all its projections in the stack, each in its own rows."""
    b_of = {r: pair.b if pair.scale == scale else pair.b * (pair.scale / scale) for r, pair in pairs.items()}
    first = next(iter(pairs.values())).a
    if len(pairs) == len(roles) and all(pair.a.shape == first.shape and pair.a.equal(first) for pair in pairs.values()):
        return first, torch.cat(list(b_of.values()))
    placed = []
    for role, b in b_of.items():
        above = roles.index(role)
        placed.append(pad(b, (0, 0, above * rows, (len(roles) - 1 - above) * rows)))
    return torch.cat([pair.a for pair in pairs.values()]), torch.cat(placed, dim=1)
