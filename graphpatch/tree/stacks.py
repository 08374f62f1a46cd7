"""Where the indices of a selector counted: one stack of layers, or several under different parents.

`layers[-8:]` in a model with two towers counts from the end of each, which may not be what was meant.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ..lang.diagnostics import Span
from .bindings import OPEN, Aligner, Placed
from .compile import Compiled
from .pattern import Names
from .tree import Parameter, Tree


class Stack(NamedTuple):
    """The containers of one shape: `model.layers`, or `model.layers[*].mlp.experts`."""

    path: str
    hit: int
    """How many of its children the hits are in."""
    length: int
    """How many it has: the sum of the containers' lengths."""


class Spread(NamedTuple):
    """A bracket that counted in several stacks."""

    text: str
    """The step as written, in backticks."""
    span: Span | None
    containers: tuple[Stack, ...]


def stacks(tree: Tree, compiled: Compiled, hits: Iterable[int | Parameter]) -> list[Spread]:
    """The brackets of a selector whose indices counted in more than one stack, judged by these hits of it.

    What a selector names one by one (`{encoder,decoder}.layers[0]`) it means, so only stacks that one reading of it
    reaches are held against each other. Stacks that differ in indices alone are one.
    """
    if not compiled.brackets or _one_container(tree, compiled):
        return []
    aligner, shapes = Aligner(tree, compiled), tree.shapes
    by_shape: dict[tuple[int, str], list[int | Parameter]] = {}
    for hit in hits:
        key = (shapes[hit[0]], hit[1]) if isinstance(hit, tuple) else (shapes[hit], "")
        alike = by_shape.get(key)
        if alike is None:
            alike = by_shape[key] = []
        alike.append(hit)
    found: dict[tuple[int, int, tuple[str, ...]], dict[tuple[str, ...], list[int | Parameter]]] = {}
    for alike in by_shape.values():
        placed = aligner.place(alike[0])
        if placed is None:
            continue
        for test, step in placed.owned.steps:
            bracket = (placed.owned.branch, step, _named(placed, test))
            container = _shape(placed, placed.taken[test])
            found.setdefault(bracket, {}).setdefault(container, []).extend(alike)
    spreads = []
    for (branch, step, _), containers in found.items():
        if len(containers) > 1:
            written = compiled.brackets.get((branch, step))
            counted = tuple(_count(aligner, step, shape, alike) for shape, alike in containers.items())
            spreads.append(Spread(f"`{written.text}`" if written else "", written.span if written else None, counted))
    return spreads


def _one_container(tree: Tree, compiled: Compiled) -> bool:
    """Whether the names before the brackets stand once in the tree, so that nothing can spread; as most often."""
    names: set[str] = set()
    for owned in compiled.patterns:
        for test, _ in owned.steps:
            before = owned.pattern.tests[test - 1] if test else None
            if not isinstance(before, Names) or before.globs or before.anything or owned.pattern.gaps[test]:
                return False
            names |= before.literals
    return not tree.places and sum(map(tree.name_counts.__getitem__, names)) <= 1


def _named(placed: Placed, test: int) -> tuple[str, ...]:
    """What the written alternatives before this bracket were in this hit."""
    return tuple(placed.segments[placed.taken[t]][0] for t in placed.owned.choices if t < test)


def _shape(placed: Placed, end: int) -> tuple[str, ...]:
    return tuple(OPEN if index >= 0 else name for name, index, _ in placed.segments[:end])


def _count(aligner: Aligner, step: int, shape: tuple[str, ...], hits: Sequence[int | Parameter]) -> Stack:
    lengths: dict[tuple[str, ...], int] = {}
    children: set[tuple[str, ...]] = set()
    for hit in hits:
        placed = aligner.place(hit)
        if placed is None:
            continue
        for test, of in placed.owned.steps:
            at = placed.taken[test]
            if of == step and _shape(placed, at) == shape:
                container = tuple(name for name, _, _ in placed.segments[:at])
                lengths[container] = placed.segments[at][2]
                children.add((*container, placed.segments[at][0]))
    return Stack(_path(shape), len(children), sum(lengths.values()))


def _path(shape: Sequence[str]) -> str:
    path = ""
    for segment in shape:
        path += "[*]" if segment == OPEN else f".{segment}" if path else segment
    return path or "the root"
