"""The form that every reader understands alike: scale 1, one rank, no patterns, experts one by one.

`lora_alpha` is `r`, so alpha / r, alpha / rank and no scale at all are one; `use_rslora` is off. All modules have the
highest rank, the others filled up with zeros. Where a reader stacks modules (q, k and v; gate and up; the experts of a
layer) those that the adapter leaves alone get factors of zeros.

`target_modules` are last names, as the servers want them. Where such a name stands for modules that the adapter leaves
alone, `exclude_modules` says so: PEFT then makes exactly the modules that are in the file, and the servers, which go by
the file alone, pass it over.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...ops.lora_experts import stacks_of
from ...ops.lora_shapes import factor_shapes
from ...tree.tree import Tree
from .adapter import PREFIX
from .deltas import Delta, refuse
from .experts import Role, names_of
from .table import STACKED

_STACKS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("q_a_proj", "kv_a_proj_with_mqa"))
"""Linears that a server computes as one."""


class Written(NamedTuple):
    """The two files of a PEFT directory."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]


def portable(deltas: Sequence[Delta], tree: Tree, base: str | None = None) -> Written:
    """The files of an adapter with these updates of a base; `base` is its name, where the base itself does not say.

    Raises `Error` (GP635) for experts that cannot be told one by one.
    """
    ones = list(_one_by_one(deltas, tree))
    ones += _siblings(ones, tree)
    excluded = list(_too_many({one.path for one in ones}, tree))
    # PEFT takes an excluded name for the end of a path too: it would take away what another path ends in.
    clash = [path for path in excluded if any(one.path.endswith(f".{path}") for one in ones)]
    ones += [_zeros(tree, path) for path in clash]
    rank = max(one.rank for one in ones)
    tensors: dict[str, Tensor] = {}
    for one in sorted(ones, key=lambda one: one.path):
        a, b = _padded(one.a, 0, rank), _padded(one.b, 1, rank)
        tails = ("lora_embedding_A", "lora_embedding_B") if one.embedding else ("lora_A.weight", "lora_B.weight")
        tensors |= {f"{PREFIX}{one.path}.{tail}": t.contiguous() for tail, t in zip(tails, (a, b))}
    return Written(_config(ones, tree, rank, base, [path for path in excluded if path not in clash]), tensors)


def _config(ones: Iterable[Delta], tree: Tree, rank: int, base: str | None, excluded: list[str]) -> dict[str, Any]:
    known = (tree.config_of(0) or {}).get("_name_or_path")
    config: dict[str, Any] = {
        "alpha_pattern": {},
        "base_model_name_or_path": base or known or None,
        "bias": "none",
        "fan_in_fan_out": _all_conv1d(ones, tree),
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {},
        "revision": None,
        "target_modules": sorted({one.path.rpartition(".")[2] for one in ones}),
        "task_type": "CAUSAL_LM" if tree.title.endswith(("ForCausalLM", "LMHeadModel")) else None,
        "use_dora": False,
        "use_rslora": False,
    }
    # Older versions of PEFT know no such setting.
    return {**config, "exclude_modules": excluded} if excluded else config


def _all_conv1d(ones: Iterable[Delta], tree: Tree) -> bool:
    nodes = [tree.find(one.path) for one in ones]
    return all(node is not None and "transformers.pytorch_utils.Conv1D" in tree.signature(node).mro for node in nodes)


def _padded(factor: Tensor, dim: int, rank: int) -> Tensor:
    """With zeros up to the rank."""
    missing = rank - factor.shape[dim]
    if not missing:
        return factor
    shape = list(factor.shape)
    shape[dim] = missing
    return torch.cat([factor, factor.new_zeros(shape)], dim)


# ── what a reader stacks ──


def _siblings(ones: Sequence[Delta], tree: Tree) -> Iterator[Delta]:
    """Zeros for linears that stand beside an adapted one, and are computed with it."""
    adapted = {one.path for one in ones}
    for path in list(adapted):
        block, dot, leaf = path.rpartition(".")
        for stack in _STACKS:
            for name in stack if leaf in stack else ():
                sibling = f"{block}{dot}{name}"
                node = tree.find(sibling)
                if sibling not in adapted and node is not None and "weight" in tree.signature(node).parameters:
                    adapted.add(sibling)
                    yield _zeros(tree, sibling)


def _zeros(tree: Tree, path: str) -> Delta:
    node = tree.find(path)
    assert node is not None
    a, b = factor_shapes(tree.signature(node), 1)
    embedding = "torch.nn.modules.sparse.Embedding" in tree.signature(node).mro
    return Delta(path, torch.zeros(a), torch.zeros(b), embedding)


def _too_many(adapted: set[str], tree: Tree) -> Iterator[str]:
    """Modules that bear the last name of an adapted one, and have no factors."""
    names = {path.rpartition(".")[2] for path in adapted}
    for node, name in enumerate(tree.names):
        if node and name in names and adapted.isdisjoint(tree.all_paths(node)):
            yield tree.paths[node]


# ── experts ──


def _one_by_one(deltas: Sequence[Delta], tree: Tree) -> Iterator[Delta]:
    """Linears as they are, and stacks of experts taken apart: under the names that they have in the model's files."""
    stacks: dict[str, dict[str, Delta]] = {}
    for delta in deltas:
        if delta.parameter is None:
            yield delta
        else:
            stacks.setdefault(delta.path, {})[delta.parameter] = delta
    wrong = [why for path in stacks if (why := _in_stacks_alone(path, tree))]
    if wrong:
        refuse(wrong)
    for path, held in stacks.items():
        yield from _experts(path, held, tree)


def _in_stacks_alone(path: str, tree: Tree) -> str:
    """Why the experts of a module cannot be told one by one; empty where they can."""
    node = tree.find(path)
    assert node is not None
    facts, kind = tree.signature(node).attributes, str((tree.config_of(node) or {}).get("model_type", ""))
    if kind.startswith(STACKED) or stacks_of(tree.signature(node))[1] or facts.get("is_concatenated") is False:
        return f"{path}: the files of {kind or 'this model'} hold experts in stacks, and llamacpp and sglang one by one"
    return ""


def _experts(path: str, held: Mapping[str, Delta], tree: Tree) -> Iterator[Delta]:
    node, names = tree.find(path), names_of(tree)
    assert node is not None
    shapes = {n: tuple(t.shape) for n, t in tree.signature(node).parameters.items() if len(t.shape) == 3}
    for name, (experts, out, in_) in shapes.items():
        delta = held.get(name)
        # Where all experts are stacked into one tensor, none may be missing.
        a = torch.zeros(experts, 1, in_) if delta is None else delta.a
        b = torch.zeros(experts, out, 1) if delta is None else delta.b
        roles: tuple[Role, ...] = ("gate", "up") if name == "gate_up_proj" else ("down",) if "down" in name else ("up",)
        for number in range(experts):
            for role, part in zip(roles, b[number].chunk(len(roles))):
                yield Delta(names.path(path, number, role), a[number], part)
