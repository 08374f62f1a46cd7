"""What tells two trees apart: what a library upgrade renamed, or why a saved plan no longer fits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .compress import compress
from .tree import Signature, Tensor, Tree

Facts = tuple[object, ...]


class Line(NamedTuple):
    """Places that changed alike."""

    paths: tuple[str, ...]
    """Compressed: as selectors of the tree they stand in."""
    modules: int
    what: str
    """What stands there: `Linear(4096, 14336)`; for a change what it was and is."""


class Renaming(NamedTuple):
    before: Line
    after: Line


class TreeDiff(NamedTuple):
    """The differences, compressed. A place is a module at its first path, or a further path of a tied one."""

    removed: tuple[Line, ...]
    added: tuple[Line, ...]
    changed: tuple[Line, ...]
    renamed: tuple[Renaming, ...]
    """The same thing under another name in the same place; not among `removed` and `added`."""
    ties: tuple[str, ...]
    """Places and parameters tied in one tree only, as sentences."""
    differing: int
    """How many modules differ."""
    size: int
    """How many modules the new tree has."""

    def __bool__(self) -> bool:
        return bool(self.removed or self.added or self.changed or self.renamed or self.ties)

    def __str__(self) -> str:
        rows = [("-", path, line.what) for line in self.removed for path in line.paths]
        rows += [("+", path, line.what) for line in self.added for path in line.paths]
        rows += [("~", path, line.what) for line in self.changed for path in line.paths]
        for before, after in self.renamed:
            rows += [(">", f"{a} -> {b}", after.what) for a, b in zip(before.paths, after.paths)]
        width = min(72, max((len(path) for _, path, _ in rows), default=0))
        lines = [f"{sign} {path:<{width}}   {what}".rstrip() for sign, path, what in rows]
        return "\n".join([*lines, *(f"~ {tie}" for tie in self.ties)])

    def to_json(self) -> dict[str, object]:
        """The same as JSON values."""
        return {
            "removed": [line._asdict() for line in self.removed],
            "added": [line._asdict() for line in self.added],
            "changed": [line._asdict() for line in self.changed],
            "renamed": [{"before": r.before._asdict(), "after": r.after._asdict()} for r in self.renamed],
            "ties": list(self.ties),
            "differing": self.differing,
            "size": self.size,
        }


def diff(old: Tree, new: Tree) -> TreeDiff:
    """What is gone, new, changed and renamed from `old` to `new`, in what a fingerprint covers."""
    facts_old, facts_new = [_facts(s) for s in old.signatures], [_facts(s) for s in new.signatures]
    nodes_old = {path: node for node, path in enumerate(old.paths)}
    nodes_new = {path: node for node, path in enumerate(new.paths)}
    removed = [node for path, node in nodes_old.items() if path not in nodes_new]
    added = [node for path, node in nodes_new.items() if path not in nodes_old]
    changed: dict[tuple[int, int], list[int]] = {}
    for path, node in nodes_new.items():
        before = nodes_old.get(path)
        if before is not None:
            pair = (old.signature_of[before], new.signature_of[node])
            if facts_old[pair[0]] != facts_new[pair[1]]:
                changed.setdefault(pair, []).append(node)
    renamed = _renamed(old, new, removed, added, facts_old, facts_new)
    gone = {node for before, _ in renamed for node in range(before, old.ends[before])}
    come = {node for _, after in renamed for node in range(after, new.ends[after])}
    by_text: dict[str, list[int]] = {}
    for (before, after), nodes in changed.items():
        by_text.setdefault(_change(old.signatures[before], new.signatures[after]), []).extend(nodes)
    return TreeDiff(
        removed=_lines(old, [node for node in removed if node not in gone]),
        added=_lines(new, [node for node in added if node not in come]),
        changed=tuple(Line(tuple(compress(new, nodes)), len(nodes), text) for text, nodes in by_text.items()),
        renamed=_renamings(old, new, renamed),
        ties=_ties(old, new),
        differing=len(removed) + len(added) + sum(map(len, changed.values())) - len(come),
        size=len(new),
    )


def _facts(signature: Signature) -> Facts:
    """What a fingerprint covers of a module."""
    return (
        signature.mro,
        sorted((name, repr(value)) for name, value in signature.attributes.items()),
        [(name, t.shape, t.dtype) for name, t in signature.parameters.items()],
        [(name, t.shape, t.dtype) for name, t in signature.buffers.items()],
    )


def _lines(tree: Tree, nodes: Sequence[int]) -> tuple[Line, ...]:
    by_what: dict[str, list[int]] = {}
    for node in nodes:
        by_what.setdefault(describe(tree.signature(node)), []).append(node)
    return tuple(Line(tuple(compress(tree, alike)), len(alike), what) for what, alike in by_what.items())


# ── names ──


def _renamed(
    old: Tree, new: Tree, removed: Iterable[int], added: Iterable[int], facts_old: list[Facts], facts_new: list[Facts]
) -> list[tuple[int, int]]:
    """Pairs (old, new) at the tops of subtrees that are the same but for the top's name, and the only such there."""
    gone: dict[str, list[int]] = {}
    come: dict[str, list[int]] = {}
    removed, added = set(removed), set(added)
    for tree, nodes, by_parent in ((old, removed, gone), (new, added, come)):
        for node in sorted(nodes):
            if tree.parents[node] not in nodes and tree.indices[node] < 0:
                by_parent.setdefault(tree.paths[tree.parents[node]], []).append(node)
    pairs = []
    for parent, before in gone.items():
        likenesses = [_likeness(new, node, facts_new) for node in come.get(parent, ())]
        own = [_likeness(old, node, facts_old) for node in before]
        for node, likeness in zip(before, own):
            if own.count(likeness) == likenesses.count(likeness) == 1:
                pairs.append((node, come[parent][likenesses.index(likeness)]))
    return pairs


def _likeness(tree: Tree, node: int, facts: list[Facts]) -> object:
    """A subtree without its top's name."""
    end = tree.ends[node]
    parents = [parent - node for parent in tree.parents[node + 1 : end]]
    return (tree.names[node + 1 : end], parents, [facts[s] for s in tree.signature_of[node:end]])


def _renamings(old: Tree, new: Tree, pairs: Sequence[tuple[int, int]]) -> tuple[Renaming, ...]:
    """Pairs that changed names alike, as one."""
    alike: dict[tuple[str, str, str], list[tuple[int, int]]] = {}
    for before, after in pairs:
        key = (old.names[before], new.names[after], describe(new.signature(after)))
        alike.setdefault(key, []).append((before, after))
    return tuple(
        Renaming(
            Line(tuple(compress(old, [b for b, _ in group])), len(group), what),
            Line(tuple(compress(new, [a for _, a in group])), len(group), what),
        )
        for (_, _, what), group in alike.items()
    )


# ── ties ──


def _ties(old: Tree, new: Tree) -> tuple[str, ...]:
    before, after = _tied(old), _tied(new)
    gone = [f"{a} is no longer tied to {b}" for a, b in before if (a, b) not in after]
    return tuple(gone + [f"{a} is now tied to {b}" for a, b in after if (a, b) not in before])


def _tied(tree: Tree) -> dict[tuple[str, str], None]:
    def path(node: int, name: str) -> str:
        return f"{tree.paths[node]}.{name}" if tree.paths[node] else name

    tied = {(path(parent, name), tree.paths[node] or "the root"): None for node, parent, name in tree.edges}
    tied |= {(path(*alias), path(*first)): None for alias, first in tree.ties}
    return tied


# ── words ──


def describe(signature: Signature) -> str:
    """A module in a few characters: `Linear(4096, 14336)`, its class and its main parameter's shape.

    A matrix reads input by output, as the class's arguments do where they say it (`in_features`, `out_features`).
    """
    tensor = next(iter(signature.parameters.values()), None)
    name = signature.cls or "parameters"
    if "in_features" in signature.attributes and "out_features" in signature.attributes:
        return f"{name}({signature.attributes['in_features']}, {signature.attributes['out_features']})"
    return f"{name}({', '.join(map(str, tensor.shape))})" if tensor else name if signature.cls else "-"


def _change(before: Signature, after: Signature) -> str:
    """What became of a module, in a line."""
    if describe(before) != describe(after):
        return f"{describe(before)} -> {describe(after)}"
    said = [f"{n}: {_value(a)} -> {_value(b)}" for n, a, b in _pairs(before.attributes, after.attributes)]
    for kind in ("parameters", "buffers"):
        for name, one, other in _pairs(getattr(before, kind), getattr(after, kind)):
            if _tensor(one) != _tensor(other):
                said.append(f"{name}: {_tensor(one)} -> {_tensor(other)}")
    if before.mro != after.mro:
        gone = [c.rpartition(".")[2] for c in before.mro if c not in after.mro]
        come = [c.rpartition(".")[2] for c in after.mro if c not in before.mro]
        said.append(f"bases: {', '.join(gone) or '-'} -> {', '.join(come) or '-'}")
    return f"{describe(after)}   " + "; ".join(said[:4]) + ("; ..." if len(said) > 4 else "")


class _None:
    def __repr__(self) -> str:
        return "-"


_NONE = _None()


def _pairs(before: object, after: object) -> list[tuple[str, object, object]]:
    assert isinstance(before, dict) and isinstance(after, dict)
    names = dict.fromkeys([*before, *after])
    pairs = [(name, before.get(name, _NONE), after.get(name, _NONE)) for name in names]
    return [(n, a, b) for n, a, b in pairs if type(a) is not type(b) or a != b]


def _value(value: object) -> str:
    """As a rule would write it."""
    return {"None": "none", "True": "true", "False": "false"}.get(repr(value), repr(value))


def _tensor(tensor: object) -> str:
    return f"{tensor.dtype}{list(tensor.shape)}" if isinstance(tensor, Tensor) else "-"
