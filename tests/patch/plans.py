"""A plan made by hand, where a test is about applying and not about planning."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass, field
from typing import Any

from graphpatch.ops.arguments import build
from graphpatch.ops.op import Target
from graphpatch.patch import apply_plan
from graphpatch.tree.tree import Tree


@dataclass
class Step:
    op: Any
    rule: str
    nodes: list[int]
    rewrite: str
    adds: Any
    label: None = None
    parameter: None = None


@dataclass
class Grads:
    own: bytearray
    added: bytearray
    each: dict = field(default_factory=dict)


@dataclass
class Plan:
    id: str
    tree: Tree
    steps: list[Step]
    grads: Grads | None = None
    allow_import: tuple[str, ...] = ()
    record: dict = field(default_factory=dict)

    def refreeze(self, model):
        return None


def step(tree: Tree, pattern: str, name: str, *positional: Any, rule: str = "test.rules:1", **named: Any) -> list[Step]:
    """The op on all modules whose path fits the glob, in steps of one signature each."""
    op = build(name, positional, named)
    groups: dict[int, list[int]] = {}
    for node, path in enumerate(tree.paths):
        if fnmatch.fnmatchcase(path, pattern):
            groups.setdefault(tree.signature_of[node], []).append(node)
    steps = []
    for nodes in groups.values():
        signature = tree.signature(nodes[0])
        parent = tree.parents[nodes[0]]
        target = Target(tree.paths[nodes[0]], signature, None, tree.signature(parent) if parent >= 0 else None)
        rewrite = next((op.accepts[c] for c in (*signature.mro, "*") if c in op.accepts), None)
        if rewrite is None:
            continue
        op.check(target)
        steps.append(Step(op, rule, nodes, rewrite, op.adds(target)))
    return steps


def plan(model, *calls, id: str = "p", freeze: bool = False, allow_import: tuple[str, ...] = ()) -> Plan:
    """Of calls `(pattern, op, {arguments})`; with `freeze`, all but what is added."""
    tree = Tree.of(model)
    steps = [s for pattern, op, named in calls for s in step(tree, pattern, op, **named)]
    grads = Grads(bytearray([1]) * len(tree), bytearray(len(tree))) if freeze else None
    return Plan(id, tree, steps, grads, allow_import)


def patch(model, *calls, **options):
    return apply_plan(plan(model, *calls, **options), model)


def lora(model, pattern: str = "*", id: str = "p", freeze: bool = True, **named: Any):
    named.setdefault("rank", 4)
    return patch(model, (pattern, "lora", named), id=id, freeze=freeze)
