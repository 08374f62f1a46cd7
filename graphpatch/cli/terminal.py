"""What the terminal wants: colour, width, a line of progress. Pipes and files get plain text."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from ..lang.diagnostics import Error

BOLD, DIM, GREEN, YELLOW, RED, RESET = "\x1b[1m", "\x1b[2m", "\x1b[32m", "\x1b[33m", "\x1b[31m", "\x1b[0m"


def color_on(stream: TextIO | None = None) -> bool:
    """Whether to colour: on a terminal, unless NO_COLOR is set (no-color.org); FORCE_COLOR colours a pipe too."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return (stream or sys.stdout).isatty() and os.environ.get("TERM") != "dumb"


def paint(text: str, code: str) -> str:
    return f"{code}{text}{RESET}" if code and color_on() else text


def width() -> int:
    """Columns to fill: those of the terminal, and what reads well where there is none."""
    return max(40, min(shutil.get_terminal_size((100, 24)).columns, 140))


def print_error(error: Error) -> None:
    color = color_on(sys.stderr)
    print("\n\n".join(d.render(color) for d in error.diagnostics), file=sys.stderr)


def note(text: str) -> None:
    """Something to know that is no part of the output."""
    print(f"graphpatch: {text}", file=sys.stderr)


@contextmanager
def progress(doing: str) -> Iterator[None]:
    """Says on stderr what takes a while, as long as it does; nothing where nobody is watching."""
    if not sys.stderr.isatty():
        yield
        return
    sys.stderr.write(f"\r\x1b[K{doing} ...")
    sys.stderr.flush()
    try:
        yield
    finally:
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()
