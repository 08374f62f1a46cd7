"""Selectors x tree -> matches: made concrete once, compiled to one automaton, matched in one pass over the tree."""

from __future__ import annotations

from typing import Iterable, Mapping, NamedTuple, Protocol, Sequence

from ..lang.diagnostics import Span
from ..lang.syntax import Expr, SelectorUnion
from .tree import Parameter, Tree


class Scope(Protocol):
    """What a selector needs from where it was written: its roles and the values in its brackets."""

    def alias(self, name: str, span: Span | None) -> tuple[SelectorUnion, Scope]:
        """The role's selector and the scope of the file that defines it; raises `Error` for an unknown role."""
        ...

    def integer(self, bound: Expr) -> int:
        """The value of an index bound; raises `Error` where it is no integer."""
        ...


class Alternative(NamedTuple):
    """A `|` branch, or one alternative of `{}` in a step or a class: each must be in a hit. Never from inside a role."""

    text: str
    """As written: `{w}` for an alternative, the branch's own text for a branch."""
    span: Span | None
    branch: int


class Compiled:
    """A selector union made concrete: roles expanded, brackets evaluated."""

    union: SelectorUnion
    alternatives: Sequence[Alternative]
    captures: frozenset[str]


def compile_selector(union: SelectorUnion, scope: Scope) -> Compiled: ...


class Hits:
    """What one `Compiled` matched: modules and parameters, sorted in tree order, each tied one once."""

    nodes: list[int]
    parameters: list[Parameter]

    def alternatives(self, hit: int | Parameter) -> int:
        """The alternatives the hit took part in, as a bit mask over `Compiled.alternatives`."""
        ...

    def bindings(self, hit: int | Parameter) -> dict[str, int]:
        """The captured indices of a hit, by name."""
        ...


def match(tree: Tree, selectors: Sequence[Compiled], added: Mapping[int, Iterable[str]] = {}) -> list[Hits]:
    """Match all selectors in one pass. `added` are names of further parameters at a node, for rules that act on the new tree."""
    ...


class Cover:
    """Everything at or below some nodes, by any of its paths, and some single parameters."""

    def __init__(self, tree: Tree, nodes: Iterable[int], parameters: Iterable[Parameter] = ()): ...

    intervals: list[tuple[int, int]]
    """Disjoint, sorted stretches of nodes; tied subtrees reached from inside included."""

    def __contains__(self, node: int) -> bool: ...

    def covers(self, parameter: Parameter) -> bool: ...
