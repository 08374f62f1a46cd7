"""`graphpatch ops`: the ops that a rule can name; with a name, its arguments, what it accepts, and its formula."""

from __future__ import annotations

import argparse
import json
import textwrap
from dataclasses import asdict

from ..lang.diagnostics import did_you_mean
from ..ops.registry import find, names
from .op_facts import OpFacts, op_facts
from .problem import CannotRun, first_line
from .terminal import BOLD, paint, width

FORMAT = 1
"""The version of the JSON form."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", nargs="?", help="one op, in full")
    parser.add_argument("--json", action="store_true", help="arguments, accepted classes and the rest as JSON")


def run(options: argparse.Namespace) -> int:
    if options.name and options.json:
        print(json.dumps({"format": FORMAT, "ops": [asdict(_facts(options.name))]}, indent=1))
        return 0
    if options.name:
        print("\n".join(_page(_facts(options.name))))
        return 0
    known = names()
    if options.json:
        print(json.dumps({"format": FORMAT, "ops": [_described(name) for name in known]}, indent=1))
        return 0
    column = max(map(len, known), default=0) + 2
    for name in known:
        try:
            about = _facts(name).summary
        except CannotRun as error:  # a plugin that is broken is no reason to hide the others
            about = f"! {error.diagnostics[0].title}"
        print(f"{paint(name.ljust(column), BOLD)}{_fitted(about, width() - column)}")
    return 0


def _described(name: str) -> dict[str, object]:
    try:
        return asdict(_facts(name))
    except CannotRun as error:
        return {"name": name, "error": error.diagnostics[0].title}


def _facts(name: str) -> OpFacts:
    try:
        op = find(name)
    except Exception as error:  # an installed plugin may fail to import in any way
        raise CannotRun("GP711", f"the op `{name}` could not be loaded", text=(first_line(error),)) from error
    if op is None:
        raise CannotRun("GP711", f"no op is called `{name}`", did_you_mean(name, names()), f"ops: {', '.join(names())}")
    return op_facts(op)


def _page(facts: OpFacts) -> list[str]:
    lines = [paint(facts.usage(), BOLD), "", *_wrapped(facts.summary)]
    for paragraph in facts.paragraphs:
        lines += ["", *_wrapped(paragraph)]
    if facts.arguments:
        lines += ["", paint("arguments", BOLD)]
    for argument in facts.arguments:
        default = "required" if argument.default is None else f"default {argument.default}"
        lines.append(f"  {argument.name:<12} {argument.kind} ({default})")
        lines += _wrapped(argument.about, " " * 15)
    if facts.open:
        lines += _wrapped("... any other name, with its value", "  ")
    lines += ["", paint("accepts", BOLD)]
    lines += [f"  {'any module' if cls == '*' else cls}   {rewrite}" for cls, rewrite in facts.accepts]
    lines += [""]
    for trait in facts.traits:
        lines += _wrapped(trait)
    return lines


def _wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, width(), initial_indent=indent, subsequent_indent=indent)


def _fitted(text: str, columns: int) -> str:
    return textwrap.shorten(text, max(20, columns), placeholder=" ...")
