"""A tree as text. Equal subtrees are found by interning them from the leaves up, so writing costs one pass."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from .compress import compress, spans_text
from .tree import Mark, Signature, Tensor, Tree, index_of

FIRST_LINE = "graphpatch tree 1"
WORD = re.compile(r"[A-Za-z_]\w*|[0-9]+")
LEVELS, OFFSETS = (0, 1), (0, 1)
"""An attribute may be the index of the nearest numbered module above, or of the next one, or one more than that."""


def render(tree: Tree) -> str:
    """The text form; `Tree.from_text` gives the same tree back, all but its live modules."""
    lines = [FIRST_LINE]
    if tree.source:
        lines.append(f"source {_json(tree.source)}")
    if tree.wrappers:
        lines.append(f"wrappers {_json(tree.wrappers)}")
    classes = _class_names(tree.signatures)
    if classes:
        lines += ["", "classes"]
        lines += [f"  {word(name)} = {' < '.join(map(_qualified, mro))}" for mro, name in classes.items()]
    lines += ["", "modules"]
    lines += _Modules(tree, classes).lines()
    for number, config in enumerate(tree.configs):
        lines += ["", f"config {number}"]
        lines += [f"  {word(key)} = {_json(value)}" for key, value in config.items()]
    if tree.marks:
        lines += ["", "marks"]
        by_marks: dict[tuple[Mark, ...], list[int]] = {}
        for node, marks in sorted(tree.marks.items()):
            by_marks.setdefault(marks, []).append(node)
        for marks, nodes in by_marks.items():
            said = [{**m._asdict(), "slots": sorted(m.slots)} for m in marks]
            lines.append(f"  {_json(said)} {' | '.join(compress(tree, nodes))}")
    lines += ["", f"end {len(tree)} modules", ""]
    return "\n".join(lines)


def word(name: str) -> str:
    """A name as it is where it is a plain word, else quoted as JSON."""
    return name if WORD.fullmatch(name) and name.isascii() else _json(name)


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _qualified(name: str) -> str:
    return name if re.fullmatch(r"[\w.<>]+", name) and name.isascii() and name not in "<>" else _json(name)


def _class_names(signatures: Iterable[Signature]) -> dict[tuple[str, ...], str]:
    """A short name for each class: its own, or with a number where two share it."""
    names: dict[tuple[str, ...], str] = {}
    taken: dict[str, int] = {}
    for signature in signatures:
        if signature.mro and signature.mro not in names:
            short = signature.cls
            taken[short] = times = taken.get(short, 0) + 1
            names[signature.mro] = short if times == 1 else f"{short}#{times}"
    return names


class _Reference(NamedTuple):
    """An attribute that is always the index of a module above."""

    level: int
    offset: int

    def __str__(self) -> str:
        return f"@{self.level or ''}" + (f"+{self.offset}" if self.offset else "")


class _Modules:
    """The lines of the modules."""

    def __init__(self, tree: Tree, classes: dict[tuple[str, ...], str]):
        self.tree, self.classes = tree, classes
        self.numbered = _numbered(tree)
        self.references = _references(tree, self.numbered)
        self.heads = [self._head(signature) for signature in tree.signatures]
        self.children: list[list[int]] = [[] for _ in tree.names]
        for node in range(1, len(tree)):
            self.children[tree.parents[node]].append(node)
        self.ties: dict[int, list[str]] = {}
        self.edges: dict[int, list[str]] = {}
        for (node, name), (first, other) in tree.ties:
            self.ties.setdefault(node, []).append(f"{word(name)} = {self._target(node, first, other)}")
        for node, parent, name in tree.edges:
            self.edges.setdefault(parent, []).append(f"{word(name)} -> {self._target(parent, node)}")

    def lines(self) -> list[str]:
        same = self._intern()
        lines: list[str] = []
        stack = [(0, 1, "^")]
        while stack:
            node, depth, key = stack.pop()
            indent = "  " * depth
            if node < 0:  # an edge, already text
                lines.append(indent + key)
                continue
            lines.append(f"{indent}{key}:{self._line(node)}")
            lines += [f"{indent}  {tie}" for tie in self.ties.get(node, ())]
            below = [(child, depth + 1, key) for child, key in self._grouped(self.children[node], same)]
            below += [(-1, depth + 1, edge) for edge in self.edges.get(node, ())]
            stack += reversed(below)
        return lines

    def _grouped(self, children: Sequence[int], same: Sequence[int]) -> Iterable[tuple[int, str]]:
        """One child for each line, and the key it stands under. The reader puts lines with brackets that follow each
        other in order of their indices, so only ascending runs are written so."""
        indices, names = self.tree.indices, self.tree.names
        at, after_run = 0, False
        while at < len(children):
            end = at
            while end < len(children) and indices[children[end]] >= 0:
                if end > at and indices[children[end]] <= indices[children[end - 1]]:
                    break
                end += 1
            if end == at or after_run:
                name = names[children[at]]
                yield children[at], _json(name) if indices[children[at]] >= 0 else word(name)
                at, after_run = at + 1, indices[children[at]] >= 0
                continue
            groups: dict[int, list[int]] = {}
            for child in children[at:end]:
                groups.setdefault(same[child], []).append(child)
            for group in groups.values():
                yield group[0], f"[{spans_text([indices[child] for child in group])}]"
            at, after_run = end, True

    def _intern(self) -> list[int]:
        """A number for each node: equal where the text below it is."""
        tree = self.tree
        known: dict[Any, int] = {}
        same = [0] * len(tree)
        names, none = tree.names, ()
        for node in range(len(tree) - 1, -1, -1):
            key = (
                self._line(node),
                tuple([(names[child], same[child]) for child in self.children[node]]),
                tuple(self.ties.get(node, none)),
                tuple(self.edges.get(node, none)),
            )
            same[node] = known.setdefault(key, len(known))
        return same

    def _line(self, node: int) -> str:
        head = self.heads[self.tree.signature_of[node]]
        length = self._odd_length(node)
        return f"{head}; length {length}" if length else head

    def _odd_length(self, node: int) -> int:
        """The length of a container where it is not what its children say, as on a pipeline stage."""
        tree = self.tree
        highest = length = -1
        for child in self.children[node]:
            if tree.indices[child] > highest:
                highest = tree.indices[child]
            if tree.lengths[child] > length:
                length = tree.lengths[child]
        if highest < 0:
            return 0
        if node in self.edges:
            highest = max([highest, *(index_of(name) for _, parent, name in tree.edges if parent == node)])
        return length if length != highest + 1 else 0

    def _head(self, signature: Signature) -> str:
        head = f" {word(self.classes[signature.mro])}" if signature.mro else ""
        for name, value in signature.attributes.items():
            reference = self.references.get((signature.mro, name)) if type(value) is int else None
            head += f" {word(name)}={reference or _json(value)}"
        for name, tensor in signature.parameters.items():
            head += f"; param {word(name)} {_tensor(tensor)}" + ("" if tensor.trainable else " frozen")
        for name, tensor in signature.buffers.items():
            head += f"; buffer {word(name)} {_tensor(tensor)}" + (" trainable" if tensor.trainable else "")
        if signature.config >= 0:
            head += f"; config {signature.config}"
        for note in sorted(signature.notes):
            head += f"; note {_json(note)}"
        return head

    # ── targets ──
    def _target(self, node: int, target: int, parameter: str | None = None) -> str:
        """The path to a module or parameter: from the nearest common module where that is inside a numbered one, so
        that it reads the same in each of them; else from the root."""
        tree = self.tree
        above, below = tree.ancestors(node), tree.ancestors(target)
        common = 0
        while common < min(len(above), len(below)) and above[common] == below[common]:
            common += 1
        start = above[common - 1]
        inside = self.numbered[start] >= 0
        tail = [tree.names[n] for n in below[common if inside else 1 :]] + (
            [parameter] if parameter is not None else []
        )
        lead = "." * (len(above) - common + 1) if inside else "^"
        return lead + ".".join(map(word, tail))


def _tensor(tensor: Tensor) -> str:
    return f"{word(tensor.dtype)}[{','.join(map(str, tensor.shape))}]"


# ── attributes that count the layers ──


def _numbered(tree: Tree) -> list[int]:
    """For each node the nearest one with an index, itself or above; -1 without."""
    numbered = [-1] * len(tree)
    for node in range(1, len(tree)):
        numbered[node] = node if tree.indices[node] >= 0 else numbered[tree.parents[node]]
    return numbered


def _references(tree: Tree, numbered: Sequence[int]) -> dict[tuple[tuple[str, ...], str], _Reference]:
    """The attributes (of a class) that are the index of a module above, wherever the class stands: `layer_idx`."""
    values: dict[tuple[tuple[str, ...], str], set[int]] = {}
    for signature in tree.signatures:
        for name, value in signature.attributes.items():
            if type(value) is int:
                values.setdefault((signature.mro, name), set()).add(value)
    varying = {key for key, found in values.items() if len(found) > 1}
    if not varying:
        return {}
    candidates = {key: [_Reference(level, offset) for level in LEVELS for offset in OFFSETS] for key in varying}
    asked: list[list[tuple[tuple[tuple[str, ...], str], int]]] = [
        [((s.mro, n), v) for n, v in s.attributes.items() if type(v) is int and (s.mro, n) in varying]
        for s in tree.signatures
    ]
    for node, number in enumerate(tree.signature_of):
        for key, value in asked[number]:
            if candidates[key]:
                indices = enclosing(tree.indices, tree.parents, numbered, node)
                candidates[key] = [
                    c for c in candidates[key] if c.level < len(indices) and indices[c.level] + c.offset == value
                ]
    return {key: found[0] for key, found in candidates.items() if found}


def enclosing(indices: Sequence[int], parents: Sequence[int], numbered: Sequence[int], node: int) -> list[int]:
    """The indices of the numbered modules at and above a node, nearest first, as many as a reference may ask for."""
    found: list[int] = []
    at = numbered[node]
    while at >= 0 and len(found) < len(LEVELS):
        found.append(indices[at])
        at = numbered[parents[at]]
    return found
