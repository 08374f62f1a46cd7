"""Files that a command writes because it was told to."""

from __future__ import annotations

from pathlib import Path

from .problem import CannotRun, first_line


def write_text(path: str, text: str) -> None:
    """Write a file, raising `CannotRun` (GP708) where that is not possible."""
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise CannotRun("GP708", f"{path} cannot be written", text=(error.strerror or first_line(error),)) from None
