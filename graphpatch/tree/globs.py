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
    first, *others = ["".join("." if c == "?" else re.escape(c) for c in part) for part in re.split(r"\*+", glob)]
    if not others:
        return re.compile(first, re.DOTALL)
    *middle, last = others
    # What stands between two stars is taken where it first comes and never again: a lookahead does not backtrack
    # (as in fnmatch), so that `*a*a*a*b` takes no time either.
    taken = "".join(f"(?=(?P<g{n}>.*?{part}))(?P=g{n})" for n, part in enumerate(middle))
    return re.compile(f"{first}{taken}.*{last}", re.DOTALL)


def has_wildcard(glob: str) -> bool:
    return "*" in glob or "?" in glob


class Fixed(NamedTuple):
    """One alternative of a step: the number of the group, and of the option in it."""

    group: int
    option: int


class Braced(NamedTuple):
    """A step's text taken apart: literal pieces and groups of alternatives, in order."""

    pieces: tuple[str | tuple[str, ...], ...]

    @property
    def groups(self) -> list[tuple[str, ...]]:
        return [piece for piece in self.pieces if not isinstance(piece, str)]

    def expand(self, fixed: Fixed | None = None) -> list[str]:
        """All globs without braces; with `fixed`, those that take this option of that group."""
        choices = [(piece,) if isinstance(piece, str) else piece for piece in self.pieces]
        if fixed is not None:
            at = [n for n, piece in enumerate(self.pieces) if not isinstance(piece, str)][fixed.group]
            choices[at] = (choices[at][fixed.option],)
        return ["".join(choice) for choice in islice(product(*choices), MOST_GLOBS)]

    @property
    def too_many(self) -> bool:
        return prod(map(len, self.groups)) > MOST_GLOBS


def split_braces(text: str) -> Braced:
    """`{q,k}_proj` -> a group of q and k, and `_proj`."""
    pieces: list[str | tuple[str, ...]] = []
    for part in re.finditer(r"\{([^{}]*)\}|[^{}]+", text):
        pieces.append(part[0] if part[1] is None else tuple(option.strip() for option in part[1].split(",")))
    return Braced(tuple(pieces))
