"""The freeze and train rules on a patched model as it stands, where the plan could not know what a module brings in."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from ..lang.diagnostics import Diagnostic, PlanError
from ..tree.tree import Tensor, Tree
from .expect import reach_all
from .freeze import Grads, added_by, decide, freeze_scope
from .rules import match_rules, rules_in_force
from .scope import World

if TYPE_CHECKING:
    import torch

    from .plan import Plan


class NewTree(NamedTuple):
    """A patched model, what patches added being ordinary there, and what is decided on it."""

    tree: Tree
    grads: Grads
    added: dict[int, dict[str, Tensor]]
    """By node of `tree`: the parameters that the planned-for model did not have (`@new`)."""


def refreeze(plan: Plan, model: torch.nn.Module, before: Iterable[torch.nn.Parameter]) -> NewTree | None:
    """Decide anew, what was there `before` not being new.

    Raises `PlanError` where a rule that fitted the planned tree does not fit this one.
    """
    if plan.grads is None:
        return None
    assert plan.tree.modules is not None, "a plan is bound to a model before it is applied"
    tree = Tree.of(model, as_patched=True)
    assert tree.modules is not None
    adds = added_by(plan.steps)
    old = {id(parameter) for parameter in before} | {
        id(parameter)
        for node, module in enumerate(plan.tree.modules)
        for name, parameter in module._parameters.items()
        if name not in adds.get(node, ())
    }
    added: dict[int, dict[str, Tensor]] = {}
    for node, module in enumerate(tree.modules):
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in old:
                added.setdefault(node, {})[name] = tree.signature(node).parameters[name]
    return decided(plan, tree, added)


def decided(plan: Plan, tree: Tree, added: dict[int, dict[str, Tensor]]) -> NewTree:
    """What the plan's freeze and train rules say of a patched tree, `added` being new in it. Raises `PlanError`."""
    _, freezes = rules_in_force(World(plan.rules.program, tree))
    match_rules(tree, freezes)
    findings: list[Diagnostic] = []
    reached = reach_all(tree, freezes, findings)
    if any(f.severity == "error" for f in findings):
        raise PlanError(findings)
    return NewTree(tree, decide(tree, [freeze_scope(tree, one) for one in reached], added), added)
