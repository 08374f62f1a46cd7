"""`PEFT`: a method of one's own, written as a hook that is called for every module."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..lang.diagnostics import refusal
from ..ops.op import Op
from ..patch.walk import walk
from ..plan.plan import Plan, patterns
from ..plan.ruleset import RuleSet, parse
from .by_hook import given_step, refuse_answer
from .callback import ModelTransform
from .inner import plan_inside


class PEFT(ModelTransform):
    """Base class of methods written by hand: override `transform`, and `freeze_model` to train something else.

    >>> class OnlyQueries(PEFT):
    ...     def transform(self, module, name=None, prefix=None):
    ...         return Lora(rank=8) if name == "q_proj" else module

    `transform` is asked about every module once, parents first, before anything changes. It returns an op (as a rule's
    `with`), another module to stand in this one's place, or the module itself. What it answered is a plan: it can be
    printed, is carried out as a whole or not at all, and is reverted as rules are.
    """

    def transform(self, module: nn.Module, name: str | None = None, prefix: str | None = None) -> Any:
        """What shall become of `module`: an `Op`, another module, or `module` itself (or None).

        `name` is the last segment of its path, `prefix` the path of its parent. Must not change the module.
        """
        raise NotImplementedError(f"{type(self).__name__} must define transform(self, module, name, prefix)")

    def freeze_model(self) -> str:
        """What trains, as statements of the rule language; the default freezes all but what was added."""
        return "freeze ** except @new"

    @property
    def has_rules(self) -> bool:
        return True

    def identity(self) -> str:
        if self.rule_set() is not None:
            return super().identity()
        # What Lightning puts on a callback (`log`) is no part of what it does.
        own = {k: repr(v) for k, v in sorted(vars(self).items()) if not k.startswith("_") and not callable(v)}
        own.pop("base_checkpoint")
        return f"{type(self).__module__}.{type(self).__qualname__} {json.dumps(own)}"

    def rule_set(self) -> RuleSet | None:
        return None

    def plan(self, model: nn.Module) -> Plan:
        """What the hook says of `model`, which stays as it is."""
        rules = self.rule_set()
        if rules is not None:
            return plan_inside(rules, model, self.adapter, patterns(self.allow_import))
        ops: dict[str, list[str]] = {}
        modules: dict[str, nn.Module] = {}
        hook = f"{type(self).__name__}.transform"
        accepted = inspect.signature(self.transform).parameters
        before = _state(model)

        def ask(module: nn.Module, name: str, prefix: str, path: str, index: int | None) -> None:
            facts: dict[str, Any] = {"name": name, "prefix": prefix, "path": path, "index": index}
            open_ended = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
            answer = self.transform(module, **{k: v for k, v in facts.items() if open_ended or k in accepted})
            if isinstance(answer, Op):
                ops.setdefault(answer.text(), []).append(path)
            elif isinstance(answer, nn.Module):
                if answer is not module:
                    modules[path] = answer
            elif answer is not None:
                raise refuse_answer(hook, path, answer)

        walk(model, ask)
        if _state(model) != before:
            raise refusal(
                "GP841",
                f"{hook} changed the model itself, and nobody could undo that",
                "return what shall stand there: an op, or another module",
            )
        if not ops and not modules:
            raise refusal("GP842", f"{hook} left every module as it is", "compare `name` with what print(model) shows")
        rules = parse("\n".join(_statements(ops, modules, hook)) + f"\n{self.freeze_model()}\n")
        plan = rules.plan(model, adapter=self.adapter, allow_import=self.allow_import)
        return given_step(plan, modules, hook)


def _statements(ops: dict[str, list[str]], modules: dict[str, nn.Module], hook: str) -> Sequence[str]:
    lines = [f"# {hook}: ^{path} becomes {type(module).__name__}" for path, module in modules.items()]
    for text, paths in ops.items():
        lines.append(f"patch {' | '.join(_anchored(path) for path in paths)} with {text}")
    return lines


def _anchored(path: str) -> str:
    """A path as a selector: what is no name of the language is quoted."""
    return "^" + ".".join(p if p.isidentifier() or p.isdecimal() else json.dumps(p) for p in path.split(".") if p)


def _state(model: nn.Module) -> list[Any]:
    """What a hook may not change: classes, children and parameters."""
    return [
        (id(m), type(m), [(name, id(held)) for name, held in (*m._modules.items(), *m._parameters.items())])
        for m in model.modules()
    ]
