"""Single indices that no container they were asked of has: errors, while a slice clips."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ..lang.diagnostics import Span
from .compile import Compiled
from .tree import Tree, index_of


class OutOfRange(NamedTuple):
    """A single index that no container it was asked of has."""

    asked: int
    text: str
    """What is wrong, in a sentence: `layers[40]` is out of range: `model.layers` has 32, 0 to 31."""
    span: Span | None
    containers: tuple[tuple[int, int], ...]
    """(node, length) of each container."""


def out_of_range(
    tree: Tree, compiled: Compiled, bracket: tuple[int, int], asked: Sequence[int]
) -> Iterable[OutOfRange]:
    containers = [(node, length) for node in asked if (length := container_length(tree, node))]
    if not containers:
        return
    spans = {
        span
        for owned in compiled.patterns
        for test, step in owned.steps
        if (owned.branch, step) == bracket
        for span in getattr(owned.pattern.tests[test], "spans", None) or ()
        if isinstance(span, int)
    }
    written = compiled.brackets.get(bracket)
    for span in sorted(spans):
        if any(-length <= span < length for _, length in containers):
            continue
        said = ", ".join(
            f"`{tree.paths[node] or 'the root'}` has {length}, 0 to {length - 1}" for node, length in containers[:3]
        )
        said += f" (and {len(containers) - 3} more)" if len(containers) > 3 else ""
        name = written.text.partition("[")[0] if written else ""
        yield OutOfRange(
            span, f"`{name}[{span}]` is out of range: {said}", written.span if written else None, tuple(containers)
        )


def container_length(tree: Tree, node: int) -> int:
    """Highest index of the children (and parameters) with integer names, plus one; 0 without such."""
    lengths = [tree.lengths[child] for child in tree.children(node)]
    lengths += [index_of(name) + 1 for name in tree.signature(node).parameters]
    lengths.append(tree._edge_lengths.get(node, 0))
    return max(lengths)
