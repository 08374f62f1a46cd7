"""Everything at or below some nodes: what `except`, `freeze` and `per` are about."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable

from .tree import Parameter, Tree


class Cover:
    """Everything at or below some nodes, by any of its paths, and some single parameters."""

    intervals: list[tuple[int, int]]
    """Disjoint, sorted stretches of nodes; tied subtrees reached from inside included."""

    def __init__(self, tree: Tree, nodes: Iterable[int], parameters: Iterable[Parameter] = ()):
        self.intervals = _merge((node, tree.ends[node]) for node in nodes)
        self._set_starts()
        # A tied module reached from inside brings its subtree, and what that reaches in turn.
        waiting = [(node, place) for node, places in tree.places.items() for place in places]
        while self.intervals:
            brought = [node for node, (parent, _) in waiting if parent in self and node not in self]
            if not brought:
                break
            self.intervals = _merge([*self.intervals, *((node, tree.ends[node]) for node in brought)])
            self._set_starts()
        first = tree.first_of
        self.parameters: set[Parameter] = {first.get(p, p) for p in parameters}
        self.parameters |= {one for alias, one in tree.ties if alias[0] in self}
        self._first = first

    def _set_starts(self) -> None:
        self._starts = [start for start, _ in self.intervals]

    def __contains__(self, node: int) -> bool:
        at = bisect_right(self._starts, node) - 1
        return at >= 0 and node < self.intervals[at][1]

    def covers(self, parameter: Parameter) -> bool:
        """Whether the parameter, by any of its paths, is at or below what is covered."""
        one = self._first.get(parameter, parameter)
        return one in self.parameters or one[0] in self or parameter[0] in self

    def __bool__(self) -> bool:
        return bool(self.intervals or self.parameters)


def _merge(intervals: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            if end > merged[-1][1]:
                merged[-1] = (merged[-1][0], end)
        else:
            merged.append((start, end))
    return merged
