"""Where rule files are: packaged ones by name, others by path; and what there is where one is not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from .diagnostics import Diagnostic, Place, RuleError, did_you_mean
from .parser import LARGEST
from .spot import short

SUFFIX = ".rules"


def _library() -> Path:
    # The wheel carries rules/ inside the package; a checkout and an editable install have it beside.
    package = Path(__file__).resolve().parent.parent
    inside = package / "rules"
    return inside if inside.is_dir() else package.parent / "rules"


LIBRARY = _library()
"""The folder of the packaged rule files."""


class Found(NamedTuple):
    """A rule file on disk: `name` is what diagnostics call it."""

    path: Path
    name: str
    packaged: bool


def packaged() -> list[str]:
    """The names of the packaged files: `lora`, and dotted for one in a folder."""
    files = LIBRARY.rglob("*" + SUFFIX) if LIBRARY.is_dir() else ()
    return sorted(".".join(f.relative_to(LIBRARY).with_suffix("").parts) for f in files)


def find_packaged(name: str, place: Place | None = None) -> Found:
    """The packaged file of a (dotted) name; raises `RuleError` (GP210)."""
    parts = name.split(".")
    known = packaged()
    if name in known:
        path = LIBRARY.joinpath(*parts[:-1], parts[-1] + SUFFIX)
        return Found(path, "/".join(parts) + SUFFIX, True)
    if parts[-1] == "rules":
        hint = f'a path stands in quotes: use "{".".join(parts[:-1])}.rules"'
    else:
        hint = did_you_mean(name, known) or f"there are {', '.join(known) or 'none'}"
    raise _refusal("GP210", f"no packaged rules are called `{short(name)}`", place, hint)


def find_path(written: str, folder: str | None, place: Place | None = None) -> Found:
    """The file of a path, relative to `folder` (None: there is none to be relative to); raises `RuleError` (GP211)."""
    if folder is None and not os.path.isabs(written):
        why = "a text that is no file has no folder: write an absolute path"
        raise _refusal("GP211", f"`{short(written)}` is relative, and to nothing", place, why)
    name = os.path.normpath(os.path.join(folder or "", written))
    path = Path(name)
    try:
        if path.is_file():
            return Found(path, path.as_posix(), False)
        there = sorted(p.name for p in path.parent.glob("*" + SUFFIX))
    except (OSError, ValueError):
        there = []
    hint = did_you_mean(path.name, there) or did_you_mean(path.stem, packaged())
    if not hint:
        hint = f"the folder has {', '.join(there[:12])}" if there else "the folder has no rule files"
    raise _refusal("GP211", f"there is no rule file `{short(written)}`", place, hint)


_STATEMENTS = ("patch ", "freeze ", "train ", "use ", "param ", "alias ", "when ")


def find(name_or_path: str | os.PathLike[str]) -> Found:
    """What `load` was given: a path, or else a packaged name; raises `RuleError`."""
    text = os.fspath(name_or_path)
    if not isinstance(text, str):
        text = os.fsdecode(text)
    if "\n" in text or "\0" in text or text.startswith(_STATEMENTS):
        raise _refusal("GP211", "this is no name of a rule file", None, "a rule text is read by graphpatch.parse(text)")
    is_path = not isinstance(name_or_path, str) or text.endswith(SUFFIX) or "/" in text or os.sep in text
    if is_path or not text or (text not in packaged() and os.path.isfile(text)):
        return find_path(text, "")
    return find_packaged(text)


def read(found: Found, place: Place | None = None) -> bytes:
    """The bytes of a rule file; raises `RuleError` (GP211)."""
    try:
        with open(found.path, "rb") as file:
            return file.read(LARGEST * 4 + 1)
    except OSError as error:
        raise _refusal("GP211", f"{found.name} cannot be read", place, error.strerror or str(error)) from None


def _refusal(code: str, title: str, place: Place | None, hint: str) -> RuleError:
    if place is None:
        return RuleError(Diagnostic(code, title, fixes=(hint,)))
    return RuleError(Diagnostic(code, title, (Place(place.source, place.span, hint),)))
