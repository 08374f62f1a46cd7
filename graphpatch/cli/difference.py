"""What differs between two trees: paths that are gone, came, changed, and those that were only renamed or moved."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from ..tree.tree import Signature, Tree


class Pair(NamedTuple):
    """A module of the old tree and the module of the new tree that it became."""

    old: int
    new: int


@dataclass
class Difference:
    """Roots of subtrees for `gone`, `come` and `renamed`; single modules for `changed`."""

    old: Tree
    new: Tree
    gone: list[int] = field(default_factory=list)
    come: list[int] = field(default_factory=list)
    renamed: list[Pair] = field(default_factory=list)
    changed: list[tuple[Pair, str]] = field(default_factory=list)
    """With what changed: `eps 1e-05 -> 1e-06`."""

    def __bool__(self) -> bool:
        return bool(self.gone or self.come or self.renamed or self.changed)


def difference(old: Tree, new: Tree) -> Difference:
    """Compare along paths; then look among what is left over for subtrees that stand elsewhere under another name.

    A subtree counts as renamed where one of the same classes and shapes came: first under the same parent, then
    anywhere (an upgrade moved `language_model.model` to `model.language_model`), then by shapes alone (its classes were
    renamed as well). Modules without parameters are never told to have moved: too many look alike.
    """
    found = Difference(old, new)
    exact = _Looks(old, new, with_classes=True)
    pending = [Pair(0, 0)]
    gone: list[int] = []
    come: list[int] = []
    while pending:
        pair = pending.pop()
        text = _what_changed(old.signature(pair.old), new.signature(pair.new))
        if text:
            found.changed.append((pair, text))
        if exact.same(pair):
            continue
        before, after = _children(old, pair.old), _children(new, pair.new)
        pending += [Pair(node, after[name]) for name, node in before.items() if name in after]
        left = [node for name, node in before.items() if name not in after]
        right = [node for name, node in after.items() if name not in before]
        for one in _alike(left, right, exact):
            found.renamed.append(one)
            left.remove(one.old)
            right.remove(one.new)
        gone += left
        come += right
    for looks in (exact, _Looks(old, new, with_classes=False)):
        gone, come = _moved(found, looks, gone, come)
    found.gone, found.come = sorted(gone), sorted(come)
    found.renamed.sort()
    found.changed.sort()
    return found


def _children(tree: Tree, node: int) -> dict[str, int]:
    return {tree.names[child]: child for child in tree.children(node)}


class _Looks:
    """Numbers for subtrees: two that look alike, in either tree, have the same."""

    def __init__(self, old: Tree, new: Tree, with_classes: bool):
        self._with_classes = with_classes
        self._interned: dict[Hashable, int] = {}
        self.old, self.new = self._number(old), self._number(new)

    def same(self, pair: Pair) -> bool:
        return self.old[pair.old] == self.new[pair.new]

    def _number(self, tree: Tree) -> list[int]:
        own = [self._interned.setdefault(self._facts(s), len(self._interned)) for s in tree.signatures]
        numbers = [0] * len(tree)
        # A parent stands before its children, so from the end every child has its number already.
        for node in range(len(tree) - 1, -1, -1):
            below = tuple((tree.names[child], numbers[child]) for child in tree.children(node))
            key = (own[tree.signature_of[node]], below)
            numbers[node] = self._interned.setdefault(key, len(self._interned))
        return numbers

    def _facts(self, signature: Signature) -> Hashable:
        tensors = tuple((name, t.shape) for name, t in signature.parameters.items())
        if not self._with_classes:
            return tensors
        return signature.mro, tuple(sorted(signature.attributes.items(), key=str)), tensors, _dtypes(signature)


def _dtypes(signature: Signature) -> tuple[tuple[str, str], ...]:
    tables = (signature.parameters, signature.buffers)
    return tuple((name, t.dtype) for table in tables for name, t in table.items())


def _alike(left: list[int], right: list[int], looks: _Looks) -> Iterator[Pair]:
    waiting: dict[int, list[int]] = defaultdict(list)
    for node in right:
        waiting[looks.new[node]].append(node)
    for node in list(left):
        if waiting[looks.old[node]]:
            yield Pair(node, waiting[looks.old[node]].pop(0))


def _moved(found: Difference, looks: _Looks, gone: list[int], come: list[int]) -> tuple[list[int], list[int]]:
    """Take from `gone` and `come` the largest subtrees that look alike; what is left, again as roots of subtrees."""
    waiting: dict[int, list[int]] = defaultdict(list)
    for node in _below(found.new, come):
        if _holds_parameters(found.new, node):
            waiting[looks.new[node]].append(node)
    taken_old: set[int] = set()
    taken_new: set[int] = set()
    for node in _below(found.old, gone):
        if node in taken_old:
            continue
        candidates = waiting.get(looks.old[node], [])
        while candidates and candidates[0] in taken_new:
            candidates.pop(0)
        if candidates:
            pair = Pair(node, candidates.pop(0))
            found.renamed.append(pair)
            taken_old.update(range(node, found.old.ends[node]))
            taken_new.update(range(pair.new, found.new.ends[pair.new]))
            # Subtrees that look alike are of one structure, so their nodes pair off in order.
            for at in range(found.old.ends[node] - node):
                inner = Pair(node + at, pair.new + at)
                text = _what_changed(found.old.signature(inner.old), found.new.signature(inner.new))
                found.changed += [(inner, text)] if text else []
    return list(_remainder(found.old, gone, taken_old)), list(_remainder(found.new, come, taken_new))


def _below(tree: Tree, roots: list[int]) -> Iterator[int]:
    for root in sorted(roots):
        yield from range(root, tree.ends[root])


def _holds_parameters(tree: Tree, node: int) -> bool:
    return any(tree.signature(n).parameters for n in range(node, tree.ends[node]))


def _remainder(tree: Tree, roots: list[int], taken: set[int]) -> Iterator[int]:
    """Roots of what was not taken; a module of which a part was taken is gone itself only if it had parameters."""
    stack = sorted(roots, reverse=True)
    while stack:
        node = stack.pop()
        if node in taken:
            continue
        if any(n in taken for n in range(node, tree.ends[node])):
            stack += reversed(tree.children(node))
            if tree.signature(node).parameters:
                yield node
        else:
            yield node


def _what_changed(old: Signature, new: Signature) -> str:
    changes = []
    if old.cls != new.cls:
        changes.append(f"{old.cls or '?'} -> {new.cls or '?'}")
    elif old.mro != new.mro:
        changes.append(f"{old.mro[0]} -> {new.mro[0]}" if old.mro[:1] != new.mro[:1] else f"the bases of {old.cls}")
    for kind, before, after in (
        ("", old.parameters, new.parameters),
        ("buffer ", old.buffers, new.buffers),
        ("", old.attributes, new.attributes),
    ):
        for name in [*before, *(n for n in after if n not in before)]:
            was, now = _shown(before, name), _shown(after, name)
            if was != now and name not in (old.parameters if before is old.attributes else ()):
                changes.append(f"{kind}{name} {was} -> {now}")
    return ", ".join(changes)


def _shown(table: object, name: str) -> str:
    value = table.get(name, "absent")  # type: ignore[attr-defined]
    return f"{list(value.shape)} {value.dtype}" if hasattr(value, "dtype") else str(value)


_INDEX = re.compile(r"(^|\.)\d+(?=\.|$)")


def template(path: str) -> str:
    """A path with its indices left open, to group what happened to every layer alike."""
    return _INDEX.sub(r"\1[*]", path)
