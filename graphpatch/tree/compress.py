"""From nodes back to selectors: `^model.layers[0:24].self_attn.{q,k,v,o}_proj`, the exact inverse of matching.

Children below which the same is selected are said in one step. Two subtrees have the same selection where their
*shapes* are equal: a shape is interned, so telling them apart and saying what is below costs once per shape, and a
model of 45,000 targets has about ten.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import takewhile

from ..lang.words import quote
from .tree import Parameter, Tree, index_of

_PLAIN = re.compile(r"\w+")
_FEW = 5
"""Up to so many evenly spaced indices are listed one by one; more are a slice with a step."""


def compress(tree: Tree, nodes: Iterable[int], parameters: Iterable[Parameter] = ()) -> list[str]:
    """Anchored selectors that match exactly these modules and parameters, in tree order.

    A parameter need not stand in the tree (a patch adds it). Empty for nothing.
    """
    return _Selection(tree, nodes, parameters).texts()


_Child = tuple[str, int, int]
"""A child or a parameter: its name, the integer it is (else -1), and the shape of what is selected below it."""


_Shape = tuple[bool, tuple[_Child, ...]]
"""Whether the node itself is selected, and the children at or below which something is."""


class _Selection:
    def __init__(self, tree: Tree, nodes: Iterable[int], parameters: Iterable[Parameter]):
        self._tree = tree
        self._selected = set(nodes)
        self._parameters: dict[int, list[str]] = {}
        for node, name in dict.fromkeys(parameters):
            self._parameters.setdefault(node, []).append(name)
        self._interned: dict[_Shape, int] = {}
        self._shapes: list[_Shape] = []
        self._endings: dict[tuple[int, bool], list[str]] = {}
        self._leaf = self._intern((True, ()))
        self._regexes: list[str] = []
        odd = {name for name in set(tree.names[1:]) if _unwritable(name)}
        odd.update(name for names in self._parameters.values() for name in names if _unwritable(name))
        if odd:
            self._set_apart(odd)

    def texts(self) -> list[str]:
        root = self._root()
        if root is None:
            return self._regexes
        texts = [f"^{ending}" for ending in self._say(root, bare=True)]
        return ["^" if text == "^" else text.replace("^.", "^", 1) for text in texts] + self._regexes

    def _set_apart(self, odd: set[str]) -> None:
        """What stands at or below a name that cannot be a step is left to regexes."""
        tree = self._tree
        for node in sorted(self._selected | self._parameters.keys()):
            below = any(tree.names[above] in odd for above in tree.ancestors(node)[1:])
            if below and node in self._selected:
                self._selected.discard(node)
                self._regexes.append(_regex(tree, node))
            names = self._parameters.get(node, [])
            apart = [name for name in names if below or name in odd]
            self._regexes += [_regex(tree, node, name) + ":Parameter" for name in apart]
            if apart:
                self._parameters[node] = [name for name in names if name not in apart]

    # ── shapes, from the leaves up ──
    def _root(self) -> int | None:
        """The shape of the root; None where nothing is left to say."""
        tree, selected, parameters, leaf = self._tree, self._selected, self._parameters, self._leaf
        parents, names, indices = tree.parents, tree.names, tree.indices
        touched = selected | parameters.keys()
        for node in list(touched):
            above = parents[node]
            while above >= 0 and above not in touched:
                touched.add(above)
                above = parents[above]
        # A module and a parameter of one name (checkpoints of quantised models): only a regex tells them apart.
        ambiguous = {name for s in tree.signatures for name in s.parameters} & set(names)
        below: dict[int, list[_Child]] = {}
        shape = None
        for node in sorted(touched, reverse=True):
            children = below.pop(node, None)
            itself = node in selected
            if itself and node and names[node] in ambiguous and names[node] in tree.signature(parents[node]).parameters:
                self._regexes.append(_regex(tree, node))
                itself = False
            if children is not None or node in parameters:
                children = (children or [])[::-1] + self._leaves(node)
            if children:
                shape = self._intern((itself, tuple(children)))
            elif itself:
                shape = leaf
            else:
                shape = None
                continue
            if node:
                child = (names[node], indices[node], shape)
                beside = below.get(parents[node])
                if beside is None:
                    below[parents[node]] = [child]
                else:
                    beside.append(child)
        return shape

    def _leaves(self, node: int) -> list[_Child]:
        """The parameters that are selected here."""
        leaves = []
        for name in self._parameters.get(node, ()):
            if name in self._tree._children[node]:
                self._regexes.append(_regex(self._tree, node, name) + ":Parameter")
            else:
                leaves.append((name, index_of(name), self._leaf))
        return leaves

    def _intern(self, shape: _Shape) -> int:
        number = self._interned.setdefault(shape, len(self._shapes))
        if number == len(self._shapes):
            self._shapes.append(shape)
            # Those of the children were made before, so nothing here recurses.
            for bare in (False, True):
                self._endings[number, bare] = self._make(shape, bare)
        return number

    # ── text, once per shape ──
    def _say(self, shape: int, bare: bool) -> list[str]:
        """What may follow the selector of a node of this shape; `bare` where a bracket cannot follow."""
        return self._endings[shape, bare]

    def _make(self, shape: _Shape, bare: bool) -> list[str]:
        selected, below_here = shape
        endings = [""] if selected else []
        groups: dict[tuple[int, bool], list[_Child]] = {}
        for child in below_here:
            groups.setdefault((child[2], child[1] >= 0 and not bare), []).append(child)
        for (below, bracket), children in groups.items():
            if bracket:
                spans = spans_text(sorted([index for _, index, _ in children]))
                endings += [f"[{spans}]{rest}" for rest in self._say(below, bare=True)]
            else:
                for step in steps_text([name for name, _, _ in children]):
                    endings += [f".{step}{rest}" for rest in self._say(below, bare=False)]
        return endings


def steps_text(names: Sequence[str]) -> list[str]:
    """Steps that stand for exactly these names: one, with braces, but for odd names, which are quoted."""
    plain = [name for name in names if _PLAIN.fullmatch(name)]
    steps = [_braced(plain)] if plain else []
    return steps + [quote(name) for name in names if not _PLAIN.fullmatch(name)]


def _braced(names: Sequence[str]) -> str:
    if len(names) == 1:
        return names[0]
    before = _common(names)
    before = before[: before.rfind("_") + 1]
    rest = [name[len(before) :] for name in names]
    after = _common([name[::-1] for name in rest])[::-1]
    after = after[after.find("_") :] if "_" in after else ""
    middle = [name[: len(name) - len(after)] for name in rest]
    if not all(middle):
        before, middle, after = "", list(names), ""
    return f"{before}{{{','.join(middle)}}}{after}"


def _common(names: Sequence[str]) -> str:
    return "".join(c[0] for c in takewhile(lambda c: len(set(c)) == 1, zip(*names)))


def spans_text(indices: Sequence[int]) -> str:
    """Sorted, distinct indices as the inside of a bracket: `0:24`, `0,5,9:12`, `0:48:6`."""
    step = indices[1] - indices[0] if len(indices) > 1 else 1
    if step > 1 and len(indices) > _FEW and list(indices) == list(range(indices[0], indices[-1] + 1, step)):
        return f"{indices[0]}:{indices[-1] + 1}:{step}"
    spans, at = [], 0
    while at < len(indices):
        end = at + 1
        while end < len(indices) and indices[end] == indices[end - 1] + 1:
            end += 1
        first, last = indices[at], indices[end - 1]
        spans.append(str(first) if first == last else f"{first}:{last + 1}")
        at = end
    return ",".join(spans)


def _unwritable(name: str) -> bool:
    """The few names that the language has no step for; safetensors files may hold them."""
    return not name or "." in name or "*" in name


def _regex(tree: Tree, node: int, parameter: str | None = None) -> str:
    path = tree.paths[node]
    if parameter is not None:
        path = f"{path}.{parameter}" if path else parameter
    return "/" + "".join(map(_escaped, path)) + "/"


def _escaped(character: str) -> str:
    """A character in a regex that stands on one line."""
    if character.isalnum() or character in "_ ":
        return character
    code = ord(character)
    return f"\\{character}" if character.isprintable() else f"\\x{code:02x}" if code < 256 else f"\\U{code:08x}"
