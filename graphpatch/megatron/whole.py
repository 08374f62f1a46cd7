"""The tree of a whole model, put together from those of its stages, virtual chunks and expert ranks.

A layer is called by its number in the whole model (`layer_number`, which counts from 1), and an expert by its own, on
whatever rank they are; so a selector means the same everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..tree.tree import Mark, Parameter, Signature, Tree, content_of, index_of

_LAYER, _LAYERS = "layer_number", "num_layers"
_EXPERTS, _EXPERT_COUNT = "local_experts", "num_moe_experts"


def numbered(tree: Tree, expert_rank: int = 0) -> Tree:
    """The tree of a stage, with the numbers that layers and experts have in the whole model."""
    names, indices, lengths = list(tree.names), list(tree.indices), list(tree.lengths)
    below: dict[int, int] = {}
    for node in range(1, len(tree)):
        if indices[node] >= 0:
            below[tree.parents[node]] = max(below.get(tree.parents[node], 0), indices[node] + 1)
    config = _config(tree)
    for node in range(1, len(tree)):
        parent = tree.parents[node]
        if indices[node] < 0:
            continue
        number, count = _global_number(tree, node, expert_rank, below[parent], config)
        if number is not None:
            names[node], indices[node], lengths[node] = str(number), number, max(count, number + 1)
    return replace(tree, names=names, indices=indices, lengths=lengths)


def _global_number(
    tree: Tree, node: int, expert_rank: int, experts: int, config: Mapping[str, Any]
) -> tuple[int | None, int]:
    """The number of a module in a list, and how many there are in the whole model; None where it is its own."""
    layer = tree.signature(node).attributes.get(_LAYER)
    if isinstance(layer, int) and any(c.startswith("megatron.core.") for c in tree.signature(node).mro):
        return layer - 1, int(config.get(_LAYERS) or 0)
    if tree.names[tree.parents[node]] == _EXPERTS:
        return expert_rank * experts + tree.indices[node], int(config.get(_EXPERT_COUNT) or 0)
    return None, 0


def _config(tree: Tree) -> Mapping[str, Any]:
    return next((c for c in tree.configs if _LAYERS in c), {})


def expert_rank() -> int:
    """This rank's among those that share the experts."""
    from megatron.core import parallel_state

    return int(parallel_state.get_expert_model_parallel_rank()) if parallel_state.is_initialized() else 0


class _Node:
    __slots__ = ("children", "marks", "name", "signature")

    def __init__(self, name: str, signature: Signature):
        self.name, self.signature = name, signature
        self.children: dict[str, _Node] = {}
        self.marks: tuple[Mark, ...] = ()


def merged(trees: Sequence[Tree]) -> Tree:
    """One tree of all that any of them has, each module once. They are stages in their order."""
    configs: list[dict[str, Any]] = []
    root: _Node | None = None
    for tree in trees:
        at = [_known(configs, config) for config in tree.configs]
        made: list[_Node] = []
        for node in range(len(tree)):
            own = tree.signature(node)
            signature = replace(own, config=at[own.config]) if own.config >= 0 else own
            if node == 0:
                root = root or _Node("", signature)
                here = root
            else:
                name = tree.names[node]
                here = made[tree.parents[node]].children.setdefault(name, _Node(name, signature))
            here.marks = here.marks or tree.marks.get(node, ())
            made.append(here)
    assert root is not None
    whole = _flat(root, configs, trees[0])
    paths = {path: node for node, path in enumerate(whole.paths)}
    whole.edges = sorted(_unique(_edges(tree, paths) for tree in trees), key=lambda edge: edge[1])
    whole.ties = list(_unique(_ties(tree, paths) for tree in trees))
    return whole


def _known(configs: list[dict[str, Any]], config: dict[str, Any]) -> int:
    if config not in configs:
        configs.append(config)
    return configs.index(config)


def _flat(root: _Node, configs: list[dict[str, Any]], like: Tree) -> Tree:
    whole = Tree([], [], [], [], [], [], [], configs=configs, source=like.source, wrappers=list(like.wrappers))
    interned: dict[Any, int] = {}

    def put(node: _Node, parent: int, length: int) -> None:
        at = len(whole.names)
        signature = interned.setdefault(content_of(node.signature), len(whole.signatures))
        if signature == len(whole.signatures):
            whole.signatures.append(node.signature)
        index = index_of(node.name)
        whole.names.append(node.name)
        whole.parents.append(parent)
        whole.indices.append(index)
        whole.lengths.append(length if index >= 0 else 0)
        whole.ends.append(0)
        whole.signature_of.append(signature)
        if node.marks:
            whole.marks[at] = node.marks
        children = sorted(node.children.values(), key=lambda child: index_of(child.name))
        highest = index_of(children[-1].name) + 1 if children else 0
        for child in children:
            put(child, at, highest)
        whole.ends[at] = len(whole.names)

    put(root, -1, 0)
    return whole


def _edges(tree: Tree, paths: Mapping[str, int]) -> list[tuple[int, int, str]]:
    return [(paths[tree.paths[node]], paths[tree.paths[parent]], name) for node, parent, name in tree.edges]


def _ties(tree: Tree, paths: Mapping[str, int]) -> list[tuple[Parameter, Parameter]]:
    def named(parameter: Parameter) -> Parameter:
        return paths[tree.paths[parameter[0]]], parameter[1]

    return [(named(alias), named(first)) for alias, first in tree.ties]


def _unique(lists: Iterable[list[Any]]) -> list[Any]:
    return list(dict.fromkeys(item for found in lists for item in found))
