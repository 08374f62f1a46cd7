"""Base weights that trained with an adapter, as PEFT keeps them: whole modules, biases, or as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from ...plan.plan import Plan
from ...tree.tree import Tree
from ..tensors import Named, base_place, tensor_at
from .keys import Adapted, peft_key
from .naming import saved_name


@dataclass
class Saved:
    modules: list[str]
    """Entries of `modules_to_save`."""
    paths: list[str]
    """The modules that these name."""
    bias: Literal["none", "all", "lora_only"]
    tensors: Named
    """By PEFT's keys."""


def saved_with(plan: Plan, targets: Sequence[Adapted], moved: Mapping[str, torch.Tensor]) -> Saved:
    """How PEFT keeps `moved`, which are base tensors by the first of their names.

    A module that holds one is saved as a whole, unless it has an adapter at or below it, or its name is the end of
    another's: then the tensor stands in the file by itself, where PEFT puts it into the base.
    """
    tree = plan.tree
    wraps = _wraps(targets)
    names = [path for node in range(1, len(tree)) for path in tree.all_paths(node)]
    spared = list(wraps)
    bias = _bias(tree, spared, moved)
    rest = {name: tensor for name, tensor in _every_name(tree, moved).items() if not _is_bias(name, bias, wraps)}
    tensors = {_key(name, wraps): moved.get(name, _live(tree, name)) for name in _biases(tree, bias, spared)}
    entries: dict[str, str] = {}
    for name in rest:
        path = name.rpartition(".")[0]
        at_or_below = any(one == path or one.startswith(f"{path}.") for one in spared)
        entry = None if at_or_below or not path else saved_name(path, names, spared)
        if entry is not None:
            entries[path] = entry
    # What stands below a saved module is saved with it.
    entries = {p: e for p, e in entries.items() if not any(p.startswith(f"{other}.") for other in entries)}
    for path in entries:
        tensors |= {peft_key(*_split(name)): _live(tree, name) for name in _held(tree, path)}
    tensors |= {key: tensor for name, tensor in rest.items() if (key := _key(name, wraps)) not in tensors}
    return Saved(sorted(set(entries.values())), list(entries), bias, tensors)


def _every_name(tree: Tree, moved: Mapping[str, torch.Tensor]) -> Named:
    """Tied weights by each of their names: PEFT copies one of the modules, and the other would keep what it had."""
    found: Named = {}
    for name, tensor in moved.items():
        name = name.removeprefix("^")
        place = tree.find_parameter(name)
        tied = tree.parameter_paths(tree.first_of.get(place, place)) if place is not None else [name]
        found |= dict.fromkeys(tied or [name], tensor)
    return found


def _bias(tree: Tree, spared: Sequence[str], moved: Mapping[str, torch.Tensor]) -> Literal["none", "all", "lora_only"]:
    biases = {name for name in _parameters(tree) if name.endswith(".bias")}
    own = {f"{path}.bias" for path in spared} & biases
    if own.isdisjoint(moved):
        return "none"
    return "all" if biases <= moved.keys() and biases != own else "lora_only"


def _biases(tree: Tree, bias: str, spared: Sequence[str]) -> list[str]:
    if bias == "none":
        return []
    own = {f"{path}.bias" for path in spared}
    return [name for name in _parameters(tree) if name.endswith(".bias") and (bias == "all" or name in own)]


def _is_bias(name: str, bias: str, wraps: Mapping[str, int]) -> bool:
    own = name.rpartition(".")[0] in wraps
    return name.endswith(".bias") and (bias == "all" or (bias == "lora_only" and own))


def _parameters(tree: Tree) -> list[str]:
    return [
        f"{path}.{name}" if path else name
        for node, path in enumerate(tree.paths)
        for name in tree.signature(node).parameters
    ]


def _held(tree: Tree, path: str) -> list[str]:
    """The parameters and buffers at and below a module that stand in its state dict."""
    node = tree.find(path)
    assert node is not None and tree.modules is not None
    found = []
    for below in range(node, tree.ends[node]):
        module, signature = tree.modules[below], tree.signature(below)
        kept = [name for name in signature.buffers if name not in module._non_persistent_buffers_set]
        at = path + tree.paths[below].removeprefix(tree.paths[node])
        found += [f"{at}.{name}" for name in (*signature.parameters, *kept)]
    return found


def _live(tree: Tree, name: str) -> torch.Tensor:
    place = base_place(tree, name)
    tensor = tensor_at(place) if place is not None else None
    assert tensor is not None, name
    return tensor


def _wraps(targets: Sequence[Adapted]) -> dict[str, int]:
    """By path, how many layers PEFT puts around a module."""
    found: dict[str, int] = {}
    for one in targets:
        found[one.path] = max(found.get(one.path, 0), one.depth + 1)
        if one.kind == "attention":
            found[f"{one.path}.out_proj"] = 1
    return found


def _key(name: str, wraps: Mapping[str, int]) -> str:
    """The key of a base tensor where modules on the way are wrapped."""
    path, tail = _split(name)
    at, out = "", ""
    for segment in path.split(".") if path else ():
        at = f"{at}.{segment}" if at else segment
        out = (f"{out}.{segment}" if out else segment) + ".base_layer" * wraps.get(at, 0)
    return peft_key(out, tail)


def _split(name: str) -> tuple[str, str]:
    path, _, tail = name.rpartition(".")
    return path, tail
