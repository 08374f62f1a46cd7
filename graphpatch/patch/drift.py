"""Is the model still the one that was planned for?"""

from __future__ import annotations

from torch import nn

from ..lang.diagnostics import ApplyError, Diagnostic
from ..tree.diff import diff
from ..tree.tree import Tree
from ..tree.wrappers import WRAPPERS

_SHOWN = 8


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside transparent wrappers: the root of its tree."""
    while True:
        child = next((WRAPPERS[c.__name__] for c in type(model).__mro__ if c.__name__ in WRAPPERS), None)
        inner = model._modules.get(child) if child else None
        if inner is None:
            return model
        model = inner


def bind(tree: Tree, model: nn.Module) -> Tree:
    """The tree with the live modules of `model`: the plan's own where it still holds, else a new one that equals it.

    Raises `ApplyError` (GP421) with the difference where the model is another.
    """
    if tree.modules is not None and tree.modules[0] is unwrapped(model) and _holds(tree):
        return tree
    now = Tree.of(model)
    if now.fingerprint == tree.fingerprint:
        return now
    raise drifted(tree, now)


def _holds(tree: Tree) -> bool:
    """Whether every module stands where the tree has it, and no other does: 0.4 of a walk."""
    modules = tree.modules
    assert modules is not None
    children = [module.__dict__["_modules"] for module in modules]
    for module, parent, name in zip(modules, tree.parents, tree.names):
        if parent >= 0 and children[parent].get(name) is not module:
            return False
    for node, parent, name in tree.edges:
        if children[parent].get(name) is not modules[node]:
            return False
    places = len(modules) - 1 + len(tree.edges)
    return sum(map(len, children)) == places or (
        sum(child is not None for held in children for child in held.values()) == places
    )


def drifted(planned: Tree, now: Tree) -> ApplyError:
    found = diff(planned, now)
    lines = str(found).splitlines()
    text = (
        f"it was made against {planned.title}, and this is {now.title}, which differs in {found.differing} of "
        f"{found.size} modules",
        *lines[:_SHOWN],
        *([f"... and {len(lines) - _SHOWN} more lines"] if len(lines) > _SHOWN else []),
    )
    return ApplyError(
        Diagnostic("GP421", "this plan was made for another tree", text=text, fixes=("plan again against this model",))
    )
