"""The same for Fabric, where the training loop is the user's own."""

from __future__ import annotations

from os import PathLike
from typing import Any

from lightning.fabric import Fabric
from torch import nn

from ..lang.diagnostics import refusal
from ..patch.patch import Patch
from ..plan.ruleset import RuleSet, load


def transform(
    fabric: Fabric,
    model: nn.Module,
    rules: str | PathLike[str] | RuleSet,
    *,
    adapter: str | None = None,
    **params: Any,
) -> Patch:
    """Apply `rules` to `model`, before the optimizer is made and before `fabric.setup`. Returns the patch.

    Save with `fabric.save(path, {"model": model}, filter={"model": lambda name, _: name in names})`, where `names` is
    `set(patch.adapter_state_dict())`, and load with `strict=False`. The plan is printed by the first process.

    Raises `ApplyError` (GP813) where `model` was set up already, and what `apply` raises.
    """
    if any(cls.__name__ == "_FabricModule" for cls in type(model).__mro__):
        raise refusal(
            "GP813",
            "this model was set up by Fabric already, and what is added now would reach no optimizer",
            "graphpatch.lightning.transform(fabric, model, rules), then the optimizer, then fabric.setup",
        )
    rule_set = rules if isinstance(rules, RuleSet) else load(rules, **params)
    plan = rule_set.plan(model, adapter=adapter)
    fabric.print(str(plan))
    return plan.apply(model)
