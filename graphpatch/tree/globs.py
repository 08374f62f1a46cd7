"""Globs within one segment, and the `{}` alternatives of a step."""

from __future__ import annotations

import re
from functools import lru_cache
from itertools import islice, product
from math import prod
from typing import NamedTuple

MOST_GLOBS = 4096
"""A step may stand for this many names; `{a,b}{a,b}{a,b}...` doubles with each group."""


@lru_cache(maxsize=4096)
def glob_regex(glob: str) -> re.Pattern[str]:
    """A glob within one segment (or one part of a class name): `*` is any text, `?` one character."""
    # Runs of stars are one: `a**b` must not backtrack.
    parts = re.findall(r"\*+|\?|[^*?]+", glob)
    return re.compile("".join(".*" if p[0] == "*" else "." if p == "?" else re.escape(p) for p in parts), re.DOTALL)


def has_wildcard(glob: str) -> bool:
    return "*" in glob or "?" in glob


class Group(NamedTuple):
    """The alternatives of one `{}`, each with its place in the text."""

    options: tuple[str, ...]
    offsets: tuple[int, ...]


class Fixed(NamedTuple):
    """One alternative of a step: the number of the group, and of the option in it."""

    group: int
    option: int


class Braced(NamedTuple):
    """A step's text taken apart: literal pieces and groups, in order."""

    pieces: tuple[str | Group, ...]

    @property
    def groups(self) -> list[Group]:
        return [piece for piece in self.pieces if isinstance(piece, Group)]

    def expand(self, fixed: Fixed | None = None) -> list[str]:
        """All globs without braces; with `fixed`, those that take this option of that group."""
        choices = [(piece,) if isinstance(piece, str) else piece.options for piece in self.pieces]
        if fixed is not None:
            at = [n for n, piece in enumerate(self.pieces) if isinstance(piece, Group)][fixed.group]
            choices[at] = (choices[at][fixed.option],)
        return ["".join(choice) for choice in islice(product(*choices), MOST_GLOBS)]

    @property
    def too_many(self) -> bool:
        return prod(len(group.options) for group in self.groups) > MOST_GLOBS


def split_braces(text: str) -> Braced:
    """`{q,k}_proj` -> a group of q and k, and `_proj`."""
    pieces: list[str | Group] = []
    for part in re.finditer(r"\{([^{}]*)\}|[^{}]+", text):
        if part[1] is None:
            pieces.append(part[0])
            continue
        options = list(re.finditer(r"[^,]*", part[1]))
        said = [(o[0].strip(), part.start(1) + o.start() + len(o[0]) - len(o[0].lstrip())) for o in options if o[0].strip()]
        pieces.append(Group(tuple(s for s, _ in said), tuple(at for _, at in said)))
    return Braced(tuple(pieces))
