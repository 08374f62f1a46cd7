"""`graphpatch check`: all that is wrong with rule files, as far as can be told without a model. Needs no torch."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager

from ..lang.diagnostics import Diagnostic, Error
from .problem import CannotRun
from .rule_files import FILE_HELP, add_settings, open_rules
from .terminal import color_on, print_error

FORMAT = 1
"""The version of the JSON form."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", metavar="FILE", nargs="+", help=FILE_HELP)
    add_settings(parser)
    parser.add_argument("--json", action="store_true", help="findings as JSON")


def run(options: argparse.Namespace) -> int:
    found: dict[str, list[Diagnostic]] = {}
    missing: list[CannotRun] = []
    with _no_pydantic_plugins():
        for file in options.files:
            try:
                found[file] = findings(file, options.settings)
            except CannotRun as error:
                missing.append(error)
    everything = [d for diagnostics in found.values() for d in diagnostics]
    if options.json:
        listed = [{"file": file, "findings": [d.to_json() for d in ds]} for file, ds in found.items()]
        print(json.dumps({"format": FORMAT, "files": listed}, indent=1))
    else:
        for diagnostic in everything:
            print(diagnostic.render(color_on()), end="\n\n")
        if found:
            print(_summary(found))
    for refusal in missing:
        print_error(refusal)
    if missing:
        return 2
    return int(any(d.severity != "style" for d in everything))


def findings(file: str, settings: list[str]) -> list[Diagnostic]:
    """What is wrong in a file and in those it uses."""
    from ..plan.check import check

    try:
        rules = open_rules(file, settings, complete=False)
        return [*check(rules), *rules.program.style()]
    except CannotRun:
        raise
    except Error as error:
        return list(error.diagnostics)


@contextmanager
def _no_pydantic_plugins() -> Iterator[None]:
    """Pydantic looks through every installed package for plugins of its own, which takes longer than the check."""
    name = "PYDANTIC_DISABLE_PLUGINS"
    before = os.environ.get(name)
    os.environ[name] = before or "__all__"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]


def _summary(found: dict[str, list[Diagnostic]]) -> str:
    files = f"{len(found)} file{'s' * (len(found) != 1)}"
    counts: dict[str, int] = {}
    for diagnostics in found.values():
        for diagnostic in diagnostics:
            counts[diagnostic.severity] = counts.get(diagnostic.severity, 0) + 1
    if not counts:
        return f"{files} checked, nothing found"
    nouns = {"error": "error", "warning": "warning", "style": "remark"}
    said = ", ".join(f"{n} {nouns[s]}{'s' * (n != 1)}" for s, n in counts.items())
    return f"{files} checked: {said}"
