"""The rule files that come with graphpatch: their names, and what each says of itself."""

from __future__ import annotations

from pathlib import Path

from ..lang.program import LIBRARY


def packaged() -> dict[str, Path]:
    """The packaged rule files by name."""
    return {path.stem: path for path in sorted(LIBRARY.glob("*.rules"))}


def about(path: Path) -> str:
    """The first comment line of a rule file, less the file's own name."""
    with path.open(encoding="utf-8") as file:
        line = file.readline()
    return line.lstrip("# ").strip().removeprefix(f"{path.name}:").strip()
