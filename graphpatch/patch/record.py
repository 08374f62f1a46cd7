"""What a patched model knows of its patches: a record on each changed module, a journal for each patch on the root.

Both are plain data that refer to modules as objects, so a deep copy or an unpickled model has its own, whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from ..tree.tree import Mark

if TYPE_CHECKING:
    from .change import Change
    from .grads import Flag

RECORD = "_graphpatch"
"""The key in a module's `__dict__`, of its `Record`."""
JOURNALS = "_graphpatch_journals"
"""The same on the root, of the list of journals, the oldest first."""


@dataclass(frozen=True)
class Record:
    """What one module has undergone. Immutable, since modules of one group share theirs."""

    marks: tuple[Mark, ...] = ()
    added: frozenset[str] = frozenset()
    """Parameters that patches added."""
    attributes: Mapping[str, Any] = field(default_factory=dict)
    """Attributes that patches changed: their original values."""
    original: nn.Module | None = None
    """The module that stood here, where a patch put another in its place."""

    def without(self, mark: Mark, added: tuple[str, ...] = (), attributes: Mapping[str, Any] | None = None) -> Record:
        marks = list(self.marks)
        if mark in marks:
            marks.remove(mark)
        kept = {k: v for k, v in self.attributes.items() if k not in (attributes or {})}
        return replace(self, marks=tuple(marks), added=self.added.difference(added), attributes=kept)

    def __bool__(self) -> bool:
        return bool(self.marks or self.added or self.attributes or self.original is not None)


EMPTY = Record()


def record_of(module: nn.Module) -> Record:
    return module.__dict__.get(RECORD, EMPTY)


def put_record(module: nn.Module, record: Record) -> None:
    if record:
        module.__dict__[RECORD] = record
    else:
        module.__dict__.pop(RECORD, None)


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

    def path(self, node: int) -> str:
        parts: list[str] = []
        while node > 0:
            parts.append(self.names[node])
            node = self.parents[node]
        return ".".join(reversed(parts))


def journals_of(module: nn.Module) -> list[Journal]:
    return module.__dict__.get(JOURNALS, [])


def roots(model: nn.Module) -> Iterator[nn.Module]:
    """The modules in and below `model` that were the root of an apply."""
    return (module for module in model.modules() if JOURNALS in module.__dict__)
