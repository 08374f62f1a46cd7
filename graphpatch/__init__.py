"""Rewrite the module graph of any PyTorch model from a rule file: plan, apply, revert."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint.load import load_adapter as load_adapter
    from .checkpoint.load import load_weights as load_weights
    from .checkpoint.mapped.load import save_weights as save_weights
    from .checkpoint.merging.merge import merge_checkpoint as merge_checkpoint
    from .checkpoint.peft.export import to_peft as to_peft
    from .checkpoint.peft.load import load_peft as load_peft
    from .checkpoint.peft.rules import from_peft as from_peft
    from .checkpoint.readers.export import export_adapter as export_adapter
    from .checkpoint.readers.validate import validate_adapter as validate_adapter
    from .checkpoint.save import save_adapter as save_adapter
    from .lang.diagnostics import ApplyError as ApplyError
    from .lang.diagnostics import Diagnostic as Diagnostic
    from .lang.diagnostics import Error as Error
    from .lang.diagnostics import PlanError as PlanError
    from .lang.diagnostics import RuleError as RuleError
    from .ops.op import Op as Op
    from .ops.registry import accept as accept
    from .ops.registry import register as register
    from .patch.adapters import Adapters as Adapters
    from .patch.adapters import adapters as adapters
    from .patch.apply import apply as apply
    from .patch.combine import combine as combine
    from .patch.lora_plus import lora_plus as lora_plus
    from .patch.patch import Patch as Patch
    from .patch.patch import patches as patches
    from .patch.walk import walk as walk
    from .plan.explain import explain as explain
    from .plan.plan import Plan as Plan
    from .plan.ruleset import RuleSet as RuleSet
    from .plan.ruleset import load as load
    from .plan.ruleset import parse as parse
    from .plan.select import select as select
    from .rewrites.tap import taps as taps
    from .tree.tree import Tree as Tree

__version__ = "0.1.0"

# Loaded when first used: reading rules and trees needs no torch.
_HOME = {
    "Adapters": "patch.adapters",
    "ApplyError": "lang.diagnostics",
    "Diagnostic": "lang.diagnostics",
    "Error": "lang.diagnostics",
    "Op": "ops.op",
    "Patch": "patch.patch",
    "Plan": "plan.plan",
    "PlanError": "lang.diagnostics",
    "RuleError": "lang.diagnostics",
    "RuleSet": "plan.ruleset",
    "Tree": "tree.tree",
    "accept": "ops.registry",
    "adapters": "patch.adapters",
    "apply": "patch.apply",
    "combine": "patch.combine",
    "explain": "plan.explain",
    "export_adapter": "checkpoint.readers.export",
    "from_peft": "checkpoint.peft.rules",
    "load": "plan.ruleset",
    "load_adapter": "checkpoint.load",
    "load_peft": "checkpoint.peft.load",
    "load_weights": "checkpoint.load",
    "lora_plus": "patch.lora_plus",
    "merge_checkpoint": "checkpoint.merging.merge",
    "parse": "plan.ruleset",
    "patches": "patch.patch",
    "register": "ops.registry",
    "save_adapter": "checkpoint.save",
    "save_weights": "checkpoint.mapped.load",
    "select": "plan.select",
    "taps": "rewrites.tap",
    "to_peft": "checkpoint.peft.export",
    "validate_adapter": "checkpoint.readers.validate",
    "walk": "patch.walk",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'graphpatch' has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
