"""`graphpatch plan`: what the rules would change in a model. Nothing is changed, and no weights are read."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from ..lang.diagnostics import Error
from .model import add_model, open_tree
from .output import write_text
from .problem import CannotRun
from .rule_files import FILE_HELP, add_settings, open_rules
from .terminal import color_on, note, progress, width

if TYPE_CHECKING:
    from ..plan.plan import Plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help=FILE_HELP)
    add_model(parser)
    add_settings(parser)
    parser.add_argument("--adapter", metavar="NAME", help="the name of the adapter that adapter ops add")
    parser.add_argument(
        "--allow-import",
        metavar="PATTERN",
        action="append",
        default=[],
        help="import what `replace` and `wrap` name where it fits ('mypkg.*'), to see that it is there; "
        "a saved plan permits nothing, Plan.apply asks again",
    )
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.add_argument("--out", metavar="FILE", help="save the plan; graphpatch.Plan.from_json reads it")
    parser.add_argument("--exit-code", action="store_true", help="exit with 2 where there is something to change")
    parser.add_argument("-v", "--verbose", action="store_true", help="list every path")


def run(options: argparse.Namespace) -> int:
    try:
        # The rules first: what is wrong with them is said before a model takes its time.
        rules = open_rules(options.file, options.settings)
        tree = open_tree(options.model)
        with progress(f"planning {rules.name}"):
            plan = rules.plan(tree, adapter=options.adapter, allow_import=options.allow_import)
            if options.allow_import:
                _try_imports(plan, options.allow_import)
    except CannotRun:
        raise
    except Error as error:
        if not options.json:
            raise
        print(json.dumps({"format": 1, "findings": [d.to_json() for d in error.diagnostics]}, indent=1))
        return 1
    if options.out:
        write_text(options.out, plan.to_json() + "\n")
    if options.json:
        print(plan.to_json())
    else:
        from ..plan.report import plan_text

        print(plan_text(plan, color_on(), options.verbose, width() if sys.stdout.isatty() else 140))
    if options.out:
        note(f"saved to {options.out}")
    return 2 if options.exit_code and _changes_something(plan) else 0


def _try_imports(plan: Plan, allowed: list[str]) -> None:
    """Import what the plan would import when applied; raises `ApplyError` where that is not permitted or not there."""
    from ..patch.imports import load_permitted, load_rewrite

    for step in plan.steps:
        imports = getattr(load_rewrite(step.rewrite, step.rule), "imports", lambda op: None)(step.op)
        if imports:
            load_permitted(imports, allowed, step.rule)


def _changes_something(plan: Plan) -> bool:
    return bool(plan.steps) or plan.grads is not None
