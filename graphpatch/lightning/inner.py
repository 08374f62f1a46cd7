"""The model inside a LightningModule: what the rules speak of, and what an adapter is loaded onto elsewhere."""

from __future__ import annotations

import lightning.pytorch as pl
from torch import nn

from ..lang.diagnostics import PlanError
from ..plan.plan import Plan
from ..plan.ruleset import RuleSet


def inner_model(module: nn.Module) -> nn.Module | None:
    """Of a LightningModule the one child with a `config`, else the one child that holds all parameters, else None.

    What stands beside it, a head or a loss, is not the base: rules that freeze the base leave it alone.
    """
    if not isinstance(module, pl.LightningModule):
        return None
    holding = [child for child in module.children() if next(child.parameters(), None) is not None]
    configured = [child for child in holding if getattr(child, "config", None) is not None]
    if len(configured) == 1:
        return configured[0]
    return holding[0] if len(holding) == 1 and not module._parameters else None


def plan_inside(rules: RuleSet, module: nn.Module, adapter: str | None, allow_import: tuple[str, ...]) -> Plan:
    """The plan for the inner model, so that what is added has the names that it has outside of Lightning; for the
    module itself where its rules speak of that (`^net.layers`)."""
    inner = inner_model(module)
    if inner is not None:
        try:
            plan = rules.plan(inner, adapter=adapter, allow_import=allow_import)
        except PlanError:
            pass
        else:
            if plan.steps or plan.already:
                return plan
    return rules.plan(module, adapter=adapter, allow_import=allow_import)
