"""Modules that a hook made, as steps of a plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import PrivateAttr
from torch import nn

from ..lang.diagnostics import ApplyError, refusal
from ..ops.op import Op
from ..plan.plan import Outcome, Plan, Step
from ..rewrites.replace import cast_new
from ..rewrites.rewrite import Replacement


class Given(Op):
    """A module that is there already takes the place."""

    op: ClassVar[str] = "transform"
    symbol: ClassVar[Literal["~", "+", "-/+"]] = "-/+"
    exclusive: ClassVar[bool] = True

    by: str
    """The hook that made it."""
    _modules: dict[int, nn.Module] = PrivateAttr(default_factory=dict)
    """By the id of the module in whose place it comes."""

    def slots(self) -> frozenset[str]:
        return frozenset({"module"})


class GivenModule(Replacement):
    @staticmethod
    def build(op: Op, cls: Any, module: nn.Module, device: torch.device) -> nn.Module:
        new = op._modules[id(module)]  # type: ignore[attr-defined]
        inside = set(module.modules())
        for part in new.modules():
            if part not in inside:
                part.training = module.training
        cast_new(new, module)
        return new


def given_step(plan: Plan, modules: Mapping[str, nn.Module], hook: str) -> Plan:
    """The plan, and after its steps one more for the modules that the hook returned, by path."""
    if not modules:
        return plan
    assert plan.tree.modules is not None
    steps = list(plan.steps)
    for path, new in modules.items():
        node = plan.tree.find(path)
        if node is None or node == 0:
            raise refusal(
                "GP843",
                f"{hook} would replace `{path or '^'}`, the root or a module that no plan can name",
                "whoever holds the model would keep the old one: replace what is inside it",
            )
        op = Given(by=hook)
        op._modules[id(plan.tree.modules[node])] = new
        before = plan.tree.signature(node).cls
        steps.append(Step(op, hook, None, [node], None, f"{__name__}:GivenModule", {}, before, type(new).__name__))
    told = Outcome(hook, "another module", len(modules), "")
    totals = plan.totals._replace(replaced=plan.totals.replaced + len(modules))
    return replace(plan, steps=steps, outcomes=[*plan.outcomes, told], totals=totals)


def refuse_answer(hook: str, path: str, answer: Any) -> ApplyError:
    return refusal(
        "GP840",
        f"{hook} returned {type(answer).__name__} for `{path or '^'}`",
        "return an op, a torch.nn.Module, or the module itself",
    )
