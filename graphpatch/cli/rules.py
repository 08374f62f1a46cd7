"""`graphpatch rules`: the rule files that come with graphpatch; with a name, the file itself."""

from __future__ import annotations

import argparse
import itertools
import re
import sys

from ..lang.diagnostics import did_you_mean
from ..lang.library import find_packaged, packaged
from .problem import CannotRun
from .terminal import BOLD, paint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", nargs="?", help="print this one")


def run(options: argparse.Namespace) -> int:
    names = packaged()
    if options.name:
        if options.name not in names:
            near = did_you_mean(options.name, names)
            raise CannotRun(
                "GP712", f"no packaged rules are called `{options.name}`", near, f"there are {', '.join(names)}"
            )
        sys.stdout.write(_text(options.name))
        return 0
    column = max(map(len, names), default=0) + 2
    for name in names:
        text = _text(name)
        print(f"{paint(name.ljust(column), BOLD)}{_about(text)}")
        for param in _params(text):
            print(f"{'':{column}}  {param}")
    return 0


def _text(name: str) -> str:
    return find_packaged(name).path.read_text(encoding="utf-8")


def _about(text: str) -> str:
    """The first sentence of the comment that a file begins with, less the file's own name."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    comment = " ".join(line.lstrip("# ") for line in lines)
    sentence = re.match(r"(?:[\w.]+\.rules:\s*)?(.*?)(?:\.\s|\.?$)", comment)
    return sentence[1] if sentence else ""


def _params(text: str) -> list[str]:
    """`rank: int = 16`, one a param of the file itself, as it stands there."""
    return re.findall(r"^param\s+([^#\n]*[^#\s])", text, re.MULTILINE)
