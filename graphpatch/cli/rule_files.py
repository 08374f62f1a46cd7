"""Rule files as the command line names them: a path, a packaged name, `-` for stdin; and the values of `--set`."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from ..lang.diagnostics import did_you_mean
from ..lang.library import packaged
from ..lang.program import Setting, load_program, parse_program
from ..plan.ruleset import RuleSet
from .model import near_file
from .problem import CannotRun

FILE_HELP = "a rule file, the name of a packaged one (`graphpatch rules` lists them), or - for stdin"


def add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set", metavar="NAME=VALUE", action="append", default=[], dest="settings", help="give a param its value"
    )


def open_rules(name: str, settings: Sequence[str] = (), *, complete: bool = True) -> RuleSet:
    """The rules of a file; `complete` asks that every param has a value.

    Raises `RuleError` for what is wrong in it, `CannotRun` (GP701, GP710) where there is no file or a setting is none.
    """
    params = dict(map(_setting, settings))
    if name == "-":
        return RuleSet(parse_program(sys.stdin.buffer.read(), params, "<stdin>", complete=complete))
    if Path(name).is_fifo():  # a shell's <(command)
        return RuleSet(parse_program(Path(name).read_bytes(), params, name, complete=complete))
    if not Path(name).is_file() and name not in packaged():
        near = near_file(Path(name), "*.rules") or did_you_mean(name, packaged())
        raise CannotRun("GP701", f"there is no rule file `{name}`", near)
    return RuleSet(load_program(name, params, complete=complete))


def _setting(text: str) -> tuple[str, Setting]:
    name, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_]\w*", name.strip()):
        raise CannotRun("GP710", f"--set takes NAME=VALUE, not {text}", "for example --set rank=32")
    return name.strip(), Setting(value.strip())
