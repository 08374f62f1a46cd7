"""Rule files as the command line names them: a path, a packaged name, `-` for stdin; and the values of `--set`."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..lang.diagnostics import did_you_mean
from ..plan.ruleset import RuleSet, load, parse
from .library import packaged
from .model import near_file
from .problem import CannotRun

FILE_HELP = "a rule file, the name of a packaged one (`graphpatch rules` lists them), or - for stdin"


def add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set", metavar="NAME=VALUE", action="append", default=[], dest="settings", help="give a param its value"
    )


def open_rules(name: str, settings: Sequence[str] = ()) -> RuleSet:
    """The rules of a file; raises `RuleError` for what is wrong in it, `CannotRun` (GP701, GP710) where there is no file."""
    params = dict(_setting(one) for one in settings)
    if name == "-":
        return parse(sys.stdin.read(), **params)
    if not Path(name).is_file() and name not in packaged():
        raise CannotRun(
            "GP701",
            f"there is no rule file {name}",
            near_file(Path(name), "*.rules") or did_you_mean(name, packaged()),
        )
    return load(name, **params)


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_]\w*", name.strip()):
        raise CannotRun("GP710", f"--set takes NAME=VALUE, not {text}", "for example --set rank=32")
    return name.strip(), _value(value.strip())


def _value(text: str) -> Any:
    """A value as a rule writes it; what is none (a bare word, a path) is text."""
    from ..lang.evaluate import constant

    try:
        return constant(text)
    except ValueError:
        return text
