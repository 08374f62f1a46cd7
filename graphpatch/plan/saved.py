"""A saved plan, read back: worked out anew from the rules and the tree it holds, and held against what it says."""

from __future__ import annotations

import json
from typing import Any

from ..lang.diagnostics import Diagnostic, PlanError
from ..tree.tree import Tree
from .plan import FORMAT, Plan
from .ruleset import RuleSet

_NEEDED = ("format", "rules", "adapter", "fingerprint", "tree", "changes", "already")


def plan_from_json(text: str | bytes) -> Plan:
    """The plan that `Plan.to_json` wrote.

    Raises `PlanError` where it is none (GP418), or means something else by now (GP419).
    """
    body = _body(text)
    rules = RuleSet.from_json(json.dumps(body["rules"]))
    tree = Tree.from_text("\n".join(body["tree"]) + "\n", "the plan's tree")
    plan = rules.plan(tree, adapter=body["adapter"])
    again = json.loads(plan.to_json())
    for what in ("fingerprint", "changes", "already"):
        if again[what] != body[what]:
            raise PlanError(
                Diagnostic(
                    "GP419",
                    f"this plan's {what} are not what its rules give now",
                    text=("the file was edited, or an op or the roles mean something else in this version",),
                    fixes=("plan again from the rule files",),
                )
            )
    return plan


def _body(text: str | bytes) -> dict[str, Any]:
    try:
        body = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _unreadable(f"it is no JSON ({error})") from None
    if not isinstance(body, dict) or any(key not in body for key in _NEEDED):
        raise _unreadable("it is JSON, but no plan")
    if body["format"] != FORMAT:
        raise _unreadable(f"its format is {body['format']}, and this version reads {FORMAT}")
    if not isinstance(body["tree"], list) or not all(isinstance(line, str) for line in body["tree"]):
        raise _unreadable("its tree is damaged")
    if not isinstance(body["adapter"], (str, type(None))):
        raise _unreadable("its settings are damaged")
    return body


def _unreadable(why: str) -> PlanError:
    return PlanError(
        Diagnostic(
            "GP418",
            "this is no plan that can be read",
            text=(why,),
            fixes=("plan again: graphpatch plan ... --out plan.json",),
        )
    )
