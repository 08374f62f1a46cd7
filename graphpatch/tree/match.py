"""One pass over the tree for all selectors at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

from .automaton import Automaton
from .compile import Compiled
from .hits import Hits
from .pattern import Indices, Pattern
from .ranges import out_of_range
from .regexes import match_regex
from .tree import Segment, Signature, Tree, index_of


def match(tree: Tree, selectors: Sequence[Compiled], added: Mapping[int, Iterable[str]] = {}) -> list[Hits]:
    """Match all selectors in one pass. `added` are names of further parameters at a node, as on the new tree.

    Raises `Error` (GP422, through the selector's scope) where a class is asked for in a tree that has none.
    """
    for compiled in selectors:
        if compiled.needs_classes and not tree.has_classes:
            compiled.scope.fail(
                "GP422",
                "this tree has no classes, so `:CLASS` cannot be judged",
                compiled.span,
                "it was read from safetensors headers; give the model's config or a .tree file",
            )
    results = [Hits(tree, compiled) for compiled in selectors]
    run = _Run(tree, selectors, added)
    run.walk()
    run.collect(results)
    for hits, compiled in zip(results, selectors):
        for regex in compiled.regexes:
            match_regex(tree, regex, added, hits)
        hits._finish()
    return results


class _State(dict[int, "tuple[_State, Callable[[int], None] | None]"]):
    """A state of the automaton; as a dict, the way on from here by the kind of the child: the next state, and where
    to note the child if there is something to it."""

    __slots__ = ("bits", "run")

    def __init__(self, run: _Run, bits: int):
        self.run, self.bits = run, bits

    def __missing__(self, kind: int) -> tuple[_State, Callable[[int], None] | None]:
        segment, signature, restart = self.run.kinds[kind]
        step = self[kind] = self.run.step(self.bits, segment, signature, restart)
        return step

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other


class _Meaning(NamedTuple):
    """What the nodes of one signature in one state are to the selectors."""

    nodes: list[int]
    modules: dict[int, int]
    """Selector -> alternatives."""
    parameters: dict[tuple[int, str], int]
    """(selector, parameter) -> alternatives."""
    probes: list[int]


class _Probe(NamedTuple):
    """Finds the containers that a bracket with a single index was asked of."""

    selector: int
    bracket: tuple[int, int]


class _Run:
    """One pass: the automaton, its states so far, and what was noted."""

    def __init__(self, tree: Tree, selectors: Sequence[Compiled], added: Mapping[int, Iterable[str]]):
        self.tree, self.selectors, self.added = tree, selectors, added
        self._number: dict[Pattern, int] = {}
        self._owners: list[list[tuple[int, int]]] = []
        self._probes: list[list[_Probe]] = []
        for number, compiled in enumerate(selectors):
            for owned in compiled.patterns:
                self._owners[self._intern(owned.pattern)].append((number, owned.alternatives))
                for test, step in owned.steps:
                    spans = owned.pattern.tests[test]
                    if isinstance(spans, Indices) and any(isinstance(s, int) for s in spans.spans or ()):
                        prefix = Pattern(owned.pattern.tests[:test], owned.pattern.gaps[: test + 1], parameters=False)
                        probe = _Probe(number, (owned.branch, step))
                        probes = self._probes[self._intern(prefix)]
                        if probe not in probes:
                            probes.append(probe)
        self.patterns = list(self._number)
        self.automaton = Automaton(self.patterns)
        self._states: dict[int, _State] = {}
        self._notes: dict[tuple[int, int], Callable[[int], None] | None] = {}
        self._meanings: list[_Meaning] = []
        self._new: list[tuple[int, str, int]] = []
        """(node, added parameter, bits) noted for `added`."""
        kinds, table = tree.kinds
        self.kinds: list[tuple[Segment, int, bool]] = [(segment, signature, False) for segment, signature in table]
        self._kind_of = kinds

    def _intern(self, pattern: Pattern) -> int:
        number = self._number.setdefault(pattern, len(self._number))
        if number == len(self._owners):
            self._owners.append([])
            self._probes.append([])
        return number

    # ── walking ──
    def walk(self) -> None:
        tree = self.tree
        inner = inner_model(tree)
        kinds = self._kind_of
        start = self.automaton.start
        if inner is not None:
            # There the model is the inner one: `^` alone is that, and what is anchored starts in both.
            start &= ~sum(1 << at for at in self._root_bits())
            kinds = [*kinds[:inner], len(self.kinds), *kinds[inner + 1 :]]
            self.kinds.append((*self.kinds[self._kind_of[inner]][:2], True))
        root = self.state(start)
        states = [root]
        push = states.append
        note = self.note(start, tree.signature_of[0])
        if note is not None:
            note(0)
        if inner is None and all(pattern.is_root for pattern in self.patterns):
            return  # `freeze ** except @new` asks for no more than the root
        node = 0
        for parent, kind in zip(tree.parents[1:], kinds[1:]):
            state, note = states[parent][kind]
            push(state)
            node += 1
            if note is not None:
                note(node)
        for at in self.added:
            self._note_added(at, states[at])
        if tree.places:
            self._walk_places(states)

    def _walk_places(self, states: list[_State]) -> None:
        """The further paths of tied modules: their subtrees once more, in the states those paths lead to."""
        tree = self.tree
        below: dict[int, list[tuple[int, str]]] = defaultdict(list)
        for node, places in tree.places.items():
            for parent, name in places:
                below[parent].append((node, name))
        seen: set[tuple[int, int]] = set()
        todo = [(node, states[parent], parent, name) for parent, ties in below.items() for node, name in ties]
        while todo:
            top, above, parent, name = todo.pop()
            signature = tree.signature_of[top]
            state, note = self.step(above.bits, tree.edge_segment(parent, name), signature, False)
            # The same state in the same place finds the same things.
            if not state.bits or state is states[top] or (top, state.bits) in seen:
                continue
            seen.add((top, state.bits))
            if note is not None:
                note(top)
            local = {top: state}
            for node in range(top, tree.ends[top]):
                if node != top:
                    local[node], note = local[tree.parents[node]][self._kind_of[node]]
                    if note is not None:
                        note(node)
                if node in self.added:
                    self._note_added(node, local[node])
                todo += [(child, local[node], node, name) for child, name in below.get(node, ())]

    def state(self, bits: int) -> _State:
        state = self._states.get(bits)
        if state is None:
            state = self._states[bits] = _State(self, bits)
        return state

    def step(
        self, bits: int, segment: Segment, signature: int, restart: bool
    ) -> tuple[_State, Callable[[int], None] | None]:
        bits = self.automaton.step(bits, segment)
        if restart:
            bits |= self.automaton.restart
        return self.state(bits), self.note(bits, signature)

    def _root_bits(self) -> Iterable[int]:
        at = 0
        for pattern in self.patterns:
            if pattern.is_root:
                yield at
            at += len(pattern.gaps)

    # ── noting ──
    def note(self, bits: int, signature: int) -> Callable[[int], None] | None:
        """Where to note a node of this signature in this state; None where it is nothing to any selector."""
        key = (bits, signature)
        if key not in self._notes:
            meaning = self._meaning(bits, self.tree.signatures[signature])
            self._notes[key] = None
            if meaning.modules or meaning.parameters or meaning.probes:
                self._meanings.append(meaning)
                self._notes[key] = meaning.nodes.append
        return self._notes[key]

    def _meaning(self, bits: int, signature: Signature) -> _Meaning:
        meaning = _Meaning([], {}, {}, [])
        for number in self.automaton.modules(bits):
            if all(test.accepts(signature.mro) for test in self.patterns[number].classes):
                for selector, alternatives in self._owners[number]:
                    meaning.modules[selector] = meaning.modules.get(selector, 0) | alternatives
            meaning.probes.extend([number] if self._probes[number] else [])
        if signature.parameters and bits:
            length = 1 + max(map(index_of, signature.parameters))
            for name in signature.parameters:
                for selector, alternatives in self._parameter(bits, name, length):
                    key = (selector, name)
                    meaning.parameters[key] = meaning.parameters.get(key, 0) | alternatives
        return meaning

    def _parameter(self, bits: int, name: str, length: int) -> Iterable[tuple[int, int]]:
        index = index_of(name)
        after = self.automaton.step(bits, (name, index, length if index >= 0 else 0))
        for number in self.automaton.parameters(after):
            yield from self._owners[number]

    def _added(self, bits: int, name: str, length: int) -> Iterable[tuple[int, int]]:
        """What an added parameter is hit by; `post_norm.weight` is one of an added module, which is hit with it."""
        *modules, parameter = name.split(".")
        for module in modules:
            bits = self.automaton.step(bits, (module, index_of(module), index_of(module) + 1))
            for number in self.automaton.modules(bits):
                if not self.patterns[number].classes:  # what its class is, no plan knows
                    yield from self._owners[number]
        yield from self._parameter(bits, parameter, 1 + index_of(parameter) if modules else length)

    def _note_added(self, node: int, state: _State) -> None:
        names = tuple(self.added[node])
        key = (state.bits, names)
        found = self._added_meanings.get(key)
        if found is None:
            found = self._added_meanings[key] = ({}, [])
            length = 1 + max(map(index_of, names), default=-1)
            for name in names:
                for selector, alternatives in self._added(state.bits, name, length):
                    found[0][selector, name] = found[0].get((selector, name), 0) | alternatives
        found[1].append(node)

    @cached_property
    def _added_meanings(self) -> dict[tuple[int, tuple[str, ...]], tuple[dict[tuple[int, str], int], list[int]]]:
        return {}

    def collect(self, results: Sequence[Hits]) -> None:
        """Hand what was noted to the selectors it belongs to."""
        containers: dict[_Probe, set[int]] = defaultdict(set)
        for meaning in self._meanings:
            for selector, alternatives in meaning.modules.items():
                results[selector]._node_runs.append((alternatives, meaning.nodes))
            for (selector, name), alternatives in meaning.parameters.items():
                results[selector]._parameter_runs.append((alternatives, name, meaning.nodes))
            for number in meaning.probes:
                for probe in self._probes[number]:
                    containers[probe].update(meaning.nodes)
        for found, nodes in self._added_meanings.values():
            for (selector, name), alternatives in found.items():
                results[selector]._parameter_runs.append((alternatives, name, nodes))
        for probe, asked in containers.items():
            compiled = self.selectors[probe.selector]
            results[probe.selector].out_of_range += out_of_range(self.tree, compiled, probe.bracket, sorted(asked))


def inner_model(tree: Tree) -> int | None:
    """In a LightningModule, its one submodule that has a config: what is anchored with `^` also starts there."""
    if not any(name.rpartition(".")[2] == "LightningModule" for name in tree.signature(0).mro):
        return None
    found = [child for child in tree.children(0) if tree.signature(child).config >= 0]
    return found[0] if len(found) == 1 else None
