"""What a patch was planned on: the model as it was before any patch."""

from __future__ import annotations

import json
from dataclasses import replace

from ..plan.plan import Plan
from ..plan.ruleset import RuleSet
from ..tree.tree import Tree
from .patch import Patch


def original_plan(patch: Patch) -> Plan:
    """The patch's plan, made anew against the model as it was before any patch."""
    record = patch.record
    rules = RuleSet.from_json(json.dumps(record["rules"]))
    tree = unmarked(Tree.of(patch.model))
    return rules.plan(tree, adapter=record["adapter"], allow_import=record["allow_import"])


def unmarked(tree: Tree) -> Tree:
    """The tree as if no patch were there."""
    return replace(tree, marks={})
