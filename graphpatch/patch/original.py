"""What a patch was planned on: the model as it was before any patch."""

from __future__ import annotations

import json
from dataclasses import replace

from torch import nn

from ..plan.plan import Plan
from ..plan.ruleset import RuleSet
from ..tree.tree import Tree
from .change import WeightChange
from .patch import Patch
from .record import journals_of, roots


def original_rules(patch: Patch) -> tuple[RuleSet, Tree]:
    """The patch's rules, and the model as it was before any patch."""
    return RuleSet.from_json(json.dumps(patch.record["rules"])), unmarked(Tree.of(patch.model))


def original_plan(patch: Patch) -> Plan:
    """The patch's plan, made anew against the model as it was before any patch."""
    rules, tree = original_rules(patch)
    return rules.plan(tree, adapter=patch.record["adapter"], allow_import=patch.record["allow_import"])


def unmarked(tree: Tree) -> Tree:
    """The tree as if no patch were there."""
    return replace(tree, marks={})


def originals(model: nn.Module) -> dict[tuple[int, str], nn.Parameter]:
    """What stood in the place of weights that patches keep in another way, by the id of the module and the name there;
    those that were let go are not among them."""
    return {
        (id(module), name): parameter
        for root in roots(model)
        for journal in journals_of(root)
        for change in journal.changes
        if isinstance(change, WeightChange)
        for module, before in zip(change.modules, change.originals)
        for name, parameter in before.items()
    }
