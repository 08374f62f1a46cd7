"""`:CLASS`: a test over the names in a module's MRO."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from .globs import glob_regex


class ClassTest(NamedTuple):
    """One of `names` is enough; `exact` (`:=`) looks at the module's own class only.

    A name without a dot is held against `__name__`. A dotted one is held against the qualified name, and may leave
    out inner packages, as public aliases do: `torch.nn.Linear` is `torch.nn.modules.linear.Linear`.
    """

    names: tuple[str, ...]
    exact: bool = False

    def accepts(self, mro: Sequence[str]) -> bool:
        lineage = mro[:1] if self.exact else mro
        return any(_is_called(qualified, name) for name in self.names for qualified in lineage)


def _is_called(qualified: str, pattern: str) -> bool:
    *package, last = pattern.split(".")
    *parts, name = qualified.split(".")
    if len(package) > len(parts) or not glob_regex(last).fullmatch(name):
        return False
    # The pattern's package is that of the class, or one above it.
    return all(glob_regex(glob).fullmatch(part) for glob, part in zip(package, parts))


def split_class(text: str) -> tuple[list[str], bool]:
    """The alternatives of a class as written (`=Linear`, `{Linear,Conv1D}`), and whether it is exact."""
    exact = text.startswith("=")
    text = text[1:].strip() if exact else text.strip()
    braced = re.fullmatch(r"\{(.*)\}", text, re.DOTALL)
    return [name.strip() for name in braced[1].split(",")] if braced else [text], exact
