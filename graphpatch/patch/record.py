"""What a patched model knows of its patches: a record on each changed module, a journal for each patch on the root.

Both are plain data that refer to modules as objects, so a deep copy or an unpickled model has its own, whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from ..rewrites.rewrite import InPlace
from ..tree.tree import Mark, Tree

if TYPE_CHECKING:
    from .change import Change
    from .grads import Flag

Place = tuple[nn.Module, str]
"""A parameter, by its module and its name there: what moves with a model, and is copied with it."""

RECORD = "_graphpatch"
"""The key in a module's `__dict__`, of its `Record`."""
JOURNALS = "_graphpatch_journals"
"""The same on the root, of the list of journals, the oldest first."""
SELECTED = "_graphpatch_selected"
"""The same, there while each sample of a batch has an adapter of its own."""


class Held(NamedTuple):
    """An in-place op on a module: the entry that it came with, and what the module's `forward` sees of it now."""

    mixin: type[InPlace]
    entry: Any
    shown: Any
    """The entry, another in its place (an adapter with a weight), or None while the op is off."""


@dataclass(frozen=True)
class Record:
    """What one module has undergone. Immutable, since modules of one group share theirs."""

    marks: tuple[Mark, ...] = ()
    added: frozenset[str] = frozenset()
    """Parameters and buffers that patches added, by dotted names those of modules that patches added, and these."""
    held: tuple[Held, ...] = ()
    """In the order in which they came: switched off and on again, each is back in its place of the sum."""
    attributes: Mapping[str, Any] = field(default_factory=dict)
    """Attributes that patches changed: their original values."""
    dropped: Mapping[str, nn.Parameter] = field(default_factory=dict)
    """The parameters that patches took away, by name."""
    original: nn.Module | None = None
    """The module that stood here, where a patch put another in its place."""

    def entries(self, attribute: str) -> tuple[Any, ...]:
        """What mixins whose entries are called `attribute` shall see on this module."""
        return tuple(h.shown for h in self.held if h.shown is not None and h.mixin.entries == attribute)

    def showing(self, mixin: type[InPlace], entry: Any, shown: Any) -> Record:
        held = tuple(h._replace(shown=shown) if h.mixin is mixin and h.entry == entry else h for h in self.held)
        return replace(self, held=held)

    def without(self, mark: Mark, added: tuple[str, ...] = (), attributes: Mapping[str, Any] | None = None) -> Record:
        marks = list(self.marks)
        if mark in marks:
            marks.remove(mark)
        kept = {k: v for k, v in self.attributes.items() if k not in (attributes or {})}
        return replace(self, marks=tuple(marks), added=self.added.difference(added), attributes=kept)

    def without_entry(self, mixin: type[InPlace], entry: Any) -> Record:
        return replace(self, held=tuple(h for h in self.held if not (h.mixin is mixin and h.entry == entry)))

    def __bool__(self) -> bool:
        return bool(self.marks or self.added or self.attributes or self.dropped or self.original is not None)


EMPTY = Record()


def record_of(module: nn.Module) -> Record:
    return module.__dict__.get(RECORD, EMPTY)


def put_record(module: nn.Module, record: Record) -> None:
    if record:
        module.__dict__[RECORD] = record
    else:
        module.__dict__.pop(RECORD, None)


@dataclass(eq=False)
class Merged:
    """What merging a patch did to the weights."""

    number: int
    """Merges of one model count up: what was merged last comes out first."""
    places: list[Place]
    paths: list[str]
    kept: list[Tensor] | None
    """The weights as they were, on the CPU; None where nothing was kept."""
    sums: list[tuple[Any, int]]
    """Of the merged weights, dtype and checksum, where something was kept: are they still what they were made?"""


@dataclass(eq=False)
class Journal:
    """What one patch did, enough to undo it and to tell of it."""

    id: str
    record: Mapping[str, Any]
    """The rules and parameters it came from, as JSON values."""
    names: list[str]
    """Of the tree it was applied to, with `parents`: the path of each node."""
    parents: list[int]
    changes: list[Change] = field(default_factory=list)
    flags: list[Flag] = field(default_factory=list)
    disabled: bool = False
    merged: Merged | None = None

    def path(self, node: int) -> str:
        parts: list[str] = []
        while node > 0:
            parts.append(self.names[node])
            node = self.parents[node]
        return ".".join(reversed(parts))


def journals_of(module: nn.Module) -> list[Journal]:
    return module.__dict__.get(JOURNALS, [])


def roots(model: nn.Module) -> Iterator[nn.Module]:
    """The modules in and below `model` that were the root of an apply, in the order of `model.modules()`, which passes
    each module on through all the levels above it, and is too slow for what every apply asks several times."""
    seen: set[int] = set()
    ahead = [model]
    while ahead:
        module = ahead.pop()
        if id(module) not in seen:
            seen.add(id(module))
            if JOURNALS in module.__dict__:
                yield module
            ahead.extend(child for child in reversed(module._modules.values()) if child is not None)


def roots_in(tree: Tree) -> list[nn.Module]:
    """The same for a tree with live modules, which was walked already: without a patch on it, it has all of them."""
    assert tree.modules is not None
    if tree.marks:
        return list(roots(tree.modules[0]))
    return [module for module in tree.modules if JOURNALS in module.__dict__]
