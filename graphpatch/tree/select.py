"""Selectors x tree -> matches: made concrete once, compiled to one automaton, matched in one pass over the tree.

This file is the room's front: what other rooms need of selectors, and the types they share.
"""

from __future__ import annotations

from .compile import Alternative, Compiled, compile_selector
from .cover import Cover
from .expand import Scope
from .hits import Hits
from .match import match
from .ranges import OutOfRange
from .tree import Parameter, Tree

__all__ = [
    "Alternative",
    "Compiled",
    "Cover",
    "Hits",
    "OutOfRange",
    "Parameter",
    "Scope",
    "compile_selector",
    "match",
    "select_paths",
]


def select_paths(tree: Tree, compiled: Compiled) -> list[str]:
    """The paths of what a selector matches, in tree order; what is tied once, by its first path."""
    (hits,) = match(tree, [compiled])
    found = [((node, -1), tree.paths[node]) for node in hits.nodes]
    for at, (node, name) in enumerate(hits.parameters):
        found.append(((node, at), f"{tree.paths[node]}.{name}" if node else name))
    return [path for _, path in sorted(found)]
