"""What a selector comes down to: patterns, each a plain sequence of segment tests with gaps between them.

Roles and branches expand to several patterns; a `**` is a gap; `{a,b}` stays one test that accepts both.
"""

from __future__ import annotations

from typing import NamedTuple, Union

from .classes import ClassTest
from .globs import glob_regex

Bounds = Union[int, tuple[Union[int, None], Union[int, None], Union[int, None]]]
"""An index, or a slice (start, stop, step); negative ones count from the end of the container."""


class Names(NamedTuple):
    """Accepts a segment by its text. A wildcard between text never accepts an index; `*` alone does."""

    literals: frozenset[str] = frozenset()
    globs: frozenset[str] = frozenset()
    anything: bool = False

    def accepts(self, name: str, index: int, length: int) -> bool:
        if self.anything or name in self.literals:
            return True
        return index < 0 and any(glob_regex(glob).fullmatch(name) for glob in self.globs)


class Indices(NamedTuple):
    """Accepts a child with an integer name; `spans` None accepts every one."""

    spans: tuple[Bounds, ...] | None = None

    def accepts(self, name: str, index: int, length: int) -> bool:
        if index < 0:
            return False
        return self.spans is None or any(within(span, index, length) for span in self.spans)


Test = Union[Names, Indices]


class Pattern(NamedTuple):
    """Segment tests in order; `gaps[j]` says whether any number of segments may stand before test `j`, `gaps[-1]` at
    the end. So the anchored `^a.**.b` has gaps (no, yes, no) and the floating `a.b` (yes, no, no)."""

    tests: tuple[Test, ...]
    gaps: tuple[bool, ...]
    classes: tuple[ClassTest, ...] = ()
    """All must hold; only where `modules`."""
    modules: bool = True
    parameters: bool = True

    @property
    def anchored(self) -> bool:
        return not self.gaps[0]

    @property
    def is_root(self) -> bool:
        """`^` alone."""
        return self.gaps == (False,)


def within(span: Bounds, index: int, length: int) -> bool:
    if isinstance(span, int):
        return index == (span + length if span < 0 else span)
    return index in range(*slice(*span).indices(length))
