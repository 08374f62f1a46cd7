"""How a hit's path lies along a selector's pattern: which segment each test took, so what a capture is bound to.

Paths that differ only in their indices lie the same way (but where a pattern leaves several), so this is worked out
once per *shape*: the path with its indices left open.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .compile import Compiled, Owned
from .pattern import Indices, Pattern, Test
from .tree import Parameter, Segment, Tree, index_of

OPEN = "#"
"""Stands for any index in a shape; no module can be called so and be an index."""


class Placed(NamedTuple):
    """A hit along a pattern."""

    owned: Owned
    segments: Sequence[Segment]
    """Of the hit's path."""
    taken: tuple[int, ...]
    """For each test, the segment it took, counted from 0."""


class Aligner:
    """Lays the hits of one selector along its patterns."""

    def __init__(self, tree: Tree, compiled: Compiled):
        self._tree = tree
        self._patterns = compiled.patterns
        self._tied = bool(tree.places or tree.ties)
        self._known: dict[tuple[int, int, str], list[tuple[Owned, tuple[int, ...] | None]]] = {}
        self._captures: dict[tuple[int, int, str], list[tuple[str, int]] | None] = {}

    def bindings(self, hit: int | Parameter) -> dict[str, int]:
        """What the captures are bound to, by name."""
        node, name = hit if isinstance(hit, tuple) else (hit, "")
        key = (self._tree.shapes[node], self._tree.signature_of[node], name)
        if key not in self._captures:
            self._captures[key] = self._only_way(hit)
        only = self._captures[key]
        if only is not None:
            parents, indices = self._tree.parents, self._tree.indices
            bound = {}
            for capture, up in only:
                at = node
                for _ in range(up):
                    at = parents[at]
                bound[capture] = indices[at]
            return bound
        placed = self.place(hit)
        if placed is None:
            return {}
        return {capture: placed.segments[placed.taken[test]][1] for test, capture in placed.owned.captures}

    def _only_way(self, hit: int | Parameter) -> list[tuple[str, int]] | None:
        """(capture, how many modules up it is bound) where all hits of this shape can match in one way alone."""
        node, name = hit if isinstance(hit, tuple) else (hit, None)
        segments = first_segments(self._tree, node)
        depth = len(segments)
        if name is not None:
            segments.append(self._parameter_segment(node, name))
        candidates = self._candidates(node, name, segments)
        if self._tied or len(candidates) != 1:
            return None
        owned, taken = candidates[0]
        if taken is None or any(taken[test] >= depth for test, _ in owned.captures):
            return None
        return [(capture, depth - 1 - taken[test]) for test, capture in owned.captures]

    def place(self, hit: int | Parameter) -> Placed | None:
        """How the hit matches: by its first path that does, by the first pattern that does, the outermost way."""
        node, name = hit if isinstance(hit, tuple) else (hit, None)
        segments = first_segments(self._tree, node)
        if name is not None:
            segments.append(self._parameter_segment(node, name))
        for owned, taken in self._candidates(node, name, segments):
            if taken is None:
                taken = align(owned.pattern, segments)
                if taken is not None:
                    return Placed(owned, segments, taken)
            elif all(owned.pattern.tests[t].accepts(*segments[at]) for t, at in enumerate(taken)):
                return Placed(owned, segments, taken)
        return self._place_elsewhere(node, name) if self._tied else None

    def _candidates(
        self, node: int, name: str | None, segments: Sequence[Segment]
    ) -> list[tuple[Owned, tuple[int, ...] | None]]:
        """The patterns that may accept a path of this shape, each with the one way it can, or None for several."""
        key = (self._tree.shapes[node], self._tree.signature_of[node], name or "")
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = []
            for owned in self._patterns:
                if self._fits(owned.pattern, node, name):
                    ways = count_ways(owned.pattern, segments)
                    if ways:
                        found.append((owned, align(owned.pattern, segments, loosely=True) if ways == 1 else None))
        return found

    def _fits(self, pattern: Pattern, node: int, name: str | None) -> bool:
        if name is not None:
            return pattern.parameters
        mro = self._tree.signature(node).mro
        return pattern.modules and all(test.accepts(mro) for test in pattern.classes)

    def _place_elsewhere(self, node: int, name: str | None) -> Placed | None:
        """Along the further paths of what is tied."""
        places = [(node, name)]
        if name is not None:
            places += [alias for alias, first in self._tree.ties if first == (node, name)]
        for owner, own in places:
            for path in self._tree.all_paths(owner):
                segments = path_segments(self._tree, path)
                if own is not None:
                    segments.append(self._parameter_segment(owner, own))
                for owned in self._patterns:
                    if self._fits(owned.pattern, owner, own):
                        taken = align(owned.pattern, segments)
                        if taken is not None:
                            return Placed(owned, segments, taken)
        return None

    def _parameter_segment(self, node: int, name: str) -> Segment:
        index = index_of(name)
        if index < 0:
            return (name, -1, 0)
        return (name, index, 1 + max(map(index_of, (*self._tree.signature(node).parameters, name))))


def first_segments(tree: Tree, node: int) -> list[Segment]:
    """The segments of a node's first path."""
    names, indices, lengths, parents = tree.names, tree.indices, tree.lengths, tree.parents
    segments = []
    while node:
        segments.append((names[node], indices[node], lengths[node]))
        node = parents[node]
    segments.reverse()
    return segments


def path_segments(tree: Tree, path: str) -> list[Segment]:
    """The segments of any path."""
    segments, parent = [], 0
    for name in path.split(".") if path else ():
        node = tree._children[parent][name]
        if tree.parents[node] == parent and tree.names[node] == name:
            segments.append((name, tree.indices[node], tree.lengths[node]))
        else:
            segments.append(tree.edge_segment(parent, name))
        parent = node
    return segments


def align(pattern: Pattern, segments: Sequence[Segment], loosely: bool = False) -> tuple[int, ...] | None:
    """For each test the segment it takes, as far left as can be; None where the path does not match.
    `loosely` lets an index be any."""
    tests = pattern.tests
    ends = _ways(pattern, segments, loosely)
    if not ends[0][0]:
        return None
    taken, at = [], 0
    for number in range(len(tests)):
        while not (_accepts(tests[number], segments[at], loosely) and ends[number + 1][at + 1]):
            at += 1
        taken.append(at)
        at += 1
    return tuple(taken)


def count_ways(pattern: Pattern, segments: Sequence[Segment]) -> int:
    """In how many ways the tests can be laid along the path, whatever its indices."""
    return _ways(pattern, segments, loosely=True)[0][0]


def _ways(pattern: Pattern, segments: Sequence[Segment], loosely: bool) -> list[list[int]]:
    """ways[j][k]: in how many ways tests j.. can be laid along segments k.. ."""
    tests, gaps = pattern.tests, pattern.gaps
    size = len(segments)
    ways = [[0] * (size + 2) for _ in range(len(tests) + 1)]
    for k in range(size, -1, -1):
        ways[-1][k] = 1 if k == size or gaps[-1] else 0
    for j in range(len(tests) - 1, -1, -1):
        for k in range(size - 1, -1, -1):
            ways[j][k] = ways[j + 1][k + 1] if _accepts(tests[j], segments[k], loosely) else 0
            if gaps[j]:
                ways[j][k] += ways[j][k + 1]
    return ways


def _accepts(test: Test, segment: Segment, loosely: bool) -> bool:
    if loosely and segment[1] >= 0:
        return isinstance(test, Indices) or test.anything or any(index_of(name) >= 0 for name in test.literals)
    return test.accepts(*segment)
