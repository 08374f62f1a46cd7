"""Lines of a `.tree` file unfolded to nodes: counted first, so that a range too far is refused and not made."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple, NoReturn

from .text_write import LEVELS
from .tree import Parameter, Signature, Tree, content_of, index_of

WORD = r'(?:[A-Za-z0-9_]+(?:#\d+)?|"(?:[^"\\]|\\.)*")'
"""A name: a plain word, or JSON in quotes."""
_DOTS = re.compile(r"(\^|\.+)")
MOST_NODES = 1_000_000
"""A model with more modules than this is a mistake in the file."""


class Reference(NamedTuple):
    level: int
    offset: int


@dataclass
class Template:
    """A line of the modules, and what stands below it."""

    line: int
    depth: int
    name: str | None
    """None where it stands for several, by index."""
    indices: Sequence[range] = ()
    facts: Signature = field(default_factory=lambda: Signature(()))
    references: dict[str, Reference] = field(default_factory=dict)
    length: int = 0
    ties: list[tuple[str, str, int]] = field(default_factory=list)
    """(name, target, line)"""
    edges: list[tuple[str, str, int]] = field(default_factory=list)
    below: list[Template] = field(default_factory=list)
    size: int = 1
    children: list[tuple[str, int, Template]] = field(default_factory=list)
    """(name, index, template), in order, one for each child; reversed, as a stack wants them."""
    numbers: dict[tuple[int, ...], int] = field(default_factory=dict)
    """The signature, by the values of the references."""


class Unfolding:
    """Makes the arrays of `tree`; `fail` complains about a line, `word` undoes a name's quotes."""

    def __init__(self, tree: Tree, fail: Callable[..., NoReturn], word: Callable[[str, int], str]):
        self.tree, self.fail, self._word = tree, fail, word
        self._known: dict[Any, int] = {}
        self._by_name: list[dict[str, int]] = []
        """For each node its children, at first paths."""

    def run(self, templates: Sequence[Template]) -> None:
        """The root's template comes first, those of the children behind."""
        for template in reversed(templates):
            self._count(template)
        for template in templates:
            template.children = self._children(template)
        self._unfold(templates[0])

    # ── counting, before anything is made ──
    def _count(self, template: Template) -> None:
        """How many modules the line stands for in each place; those below were counted before."""
        for child in template.below:
            template.size += child.size * (1 if child.name is not None else sum(map(len, child.indices)))
            if template.size > MOST_NODES:
                self.fail("GP434", f"this tree has more than {MOST_NODES:,} modules", child.line, "is the range meant?")

    def _children(self, template: Template) -> list[tuple[str, int, Template]]:
        children: list[tuple[str, int, Template]] = []
        run: list[tuple[str, int, Template]] = []
        for child in template.below:
            if child.name is None:
                run += [(str(i), i, child) for i in chain.from_iterable(child.indices)]
            else:
                children += sorted(run, key=_by_index)
                run = []
                children.append((child.name, index_of(child.name), child))
        children += sorted(run, key=_by_index)
        names = [name for name, _, _ in children] + [name for name, _, _ in template.edges]
        if len(set(names)) < len(names):
            twice = Counter(names).most_common(1)[0][0]
            self.fail("GP433", f"`{twice[:80]}` stands twice below this module", template.line)
        highest = 1 + max(map(index_of, names), default=-1)
        if template.length and template.length < highest:
            self.fail("GP433", f"length {template.length} is less than its highest index", template.line)
        template.length = template.length or highest
        children.reverse()
        return children

    # ── unfolding ──
    def _unfold(self, root: Template) -> None:
        tree = self.tree
        names, parents, indices, lengths, signature_of = (
            tree.names, tree.parents, tree.indices, tree.lengths, tree.signature_of,
        )  # fmt: skip
        stack: list[tuple[str, int, Template, int, int, tuple[int, ...]]] = [("", -1, root, -1, 0, ())]
        edges: list[tuple[int, str, str, int]] = []
        ties: list[tuple[int, str, str, int]] = []
        pop = stack.pop
        while stack:
            name, index, template, parent, length, above = pop()
            node = len(names)
            names.append(name)
            parents.append(parent)
            indices.append(index)
            lengths.append(length)
            if index >= 0:
                above = (index, *above[: len(LEVELS) - 1])
            signature_of.append(self._signature(template, above))
            if template.edges:
                edges += [(node, *edge) for edge in template.edges]
            if template.ties:
                ties += [(node, *tie) for tie in template.ties]
            size = template.length
            stack += [(n, i, t, node, size if i >= 0 else 0, above) for n, i, t in template.children]
        tree.ends = [0] * len(names)
        for node in range(len(names) - 1, -1, -1):
            tree.ends[node] = max(tree.ends[node], node + 1)
            if node:
                tree.ends[parents[node]] = max(tree.ends[parents[node]], tree.ends[node])
        self._by_name = [{} for _ in names]
        for node in range(1, len(names)):
            self._by_name[parents[node]][names[node]] = node
        edges.sort(key=lambda edge: edge[0])
        tree.edges = [(self._target(parent, to, line)[0], parent, name) for parent, name, to, line in edges]
        for node, name, target, line in ties:
            if name not in tree.signature(node).parameters:
                self.fail("GP433", f"there is no parameter `{name}` to tie", line)
            tree.ties.append(((node, name), self._tied(self._target(node, target, line, True), line)))

    def _signature(self, template: Template, above: tuple[int, ...]) -> int:
        values: tuple[int, ...] = ()
        if template.references:
            if any(r.level >= len(above) for r in template.references.values()):
                self.fail("GP433", "`@` stands in no numbered module", template.line)
            values = tuple([above[r.level] + r.offset for r in template.references.values()])
        number = template.numbers.get(values)
        if number is None:
            facts = template.facts
            attributes = {**facts.attributes, **dict(zip(template.references, values))}
            made = Signature(facts.mro, attributes, facts.parameters, facts.buffers, facts.config, facts.notes)
            number = self._known.setdefault(content_of(made), len(self._known))
            if number == len(self.tree.signatures):
                self.tree.signatures.append(made)
            template.numbers[values] = number
        return number

    def _target(self, node: int, target: str, line: int, parameter: bool = False) -> tuple[int, str]:
        """The module a link leads to, and the parameter's name there."""
        lead = _DOTS.match(target)
        rest = target[lead.end() :].strip() if lead else ""
        steps = re.findall(rf"({WORD})(?:\.|$)", rest)
        if not lead or ".".join(steps) != rest:
            self.fail("GP433", "a path reads `^model.act`, `.act` or `..act`", line)
        at = 0
        if lead[1] != "^":
            at = node
            for _ in lead[1][1:]:
                at = self.tree.parents[at]
                if at < 0:
                    self.fail("GP433", "this path leads above the root", line)
        names = [self._word(step, line) for step in steps]
        last = names.pop() if parameter and names else ""
        for step in names:
            at = self._by_name[at].get(step, -1)
            if at < 0:
                self.fail("GP433", f"there is nothing at `{target[:80]}`", line)
        return at, last

    def _tied(self, parameter: Parameter, line: int) -> Parameter:
        if parameter[1] not in self.tree.signature(parameter[0]).parameters:
            self.fail("GP433", f"there is no parameter `{parameter[1]}` to be tied to", line)
        return parameter


def _by_index(child: tuple[str, int, Template]) -> int:
    return child[1]
