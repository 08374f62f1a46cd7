"""`graphpatch rules`: the rule files that come with graphpatch; with a name, the file itself."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from ..lang.diagnostics import did_you_mean
from .library import about, packaged
from .problem import CannotRun
from .terminal import BOLD, paint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", nargs="?", help="print this one")


def run(options: argparse.Namespace) -> int:
    files = packaged()
    if options.name:
        if options.name not in files:
            known = ", ".join(files)
            raise CannotRun("GP712", f"no packaged rules are called `{options.name}`", did_you_mean(options.name, files), known)
        sys.stdout.write(files[options.name].read_text(encoding="utf-8"))
        return 0
    column = max(map(len, files), default=0) + 2
    for name, path in files.items():
        print(f"{paint(name.ljust(column), BOLD)}{about(path)}")
        for param in _params(path):
            print(f"{'':{column}}  {param}")
    return 0


def _params(path: Path) -> list[str]:
    """`rank: int = 16`, one a param of the file itself, as it stands there."""
    return re.findall(r"^param\s+([^#\n]*[^#\s])", path.read_text(encoding="utf-8"), re.MULTILINE)
