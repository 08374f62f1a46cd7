"""Why a selector matched nothing: how far it got, what stands there instead, and what was probably meant."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ..lang.diagnostics import Span, did_you_mean
from .compile import Compiled, Owned
from .compress import compress, spans_text, steps_text
from .hits import Hits
from .match import match
from .pattern import Bounds, Indices, Names, Pattern
from .ranges import container_length
from .tree import Parameter, Tree, index_of

_MOST_PATTERNS = 64
"""A role may stand for hundreds of paths; the nearest miss is among the first."""
_MOST_NAMES = 12


class NearMiss(NamedTuple):
    """Why nothing was matched, in a sentence."""

    text: str
    span: Span | None = None
    """Where the selector stands that missed."""
    reached: tuple[int, ...] = ()
    """The nodes where it stopped; empty where it never started."""


def near_miss(tree: Tree, compiled: Compiled, alternative: int | None = None) -> NearMiss:
    """Why the selector, or one of its alternatives, matched nothing."""
    span = compiled.alternatives[alternative].span if alternative is not None else compiled.span
    owned = [o for o in compiled.patterns if alternative is None or o.alternatives >> alternative & 1]
    if not owned:
        return NearMiss(_regex(tree, compiled, alternative), span)
    stops = [stop for one in owned[:_MOST_PATTERNS] if (stop := _stop(tree, compiled, one)) is not None]
    if not stops:
        return NearMiss("it does match, but what it matches was filtered out", span)
    furthest = max(stops, key=lambda stop: stop.progress)
    if not furthest.reached:
        return NearMiss(_nowhere(tree, [stop for stop in stops if not stop.reached]), span)
    return NearMiss(furthest.text(tree), span, tuple(furthest.reached))


def _regex(tree: Tree, compiled: Compiled, alternative: int | None) -> str:
    """Nothing but regexes was asked for, and they hit nothing."""
    asked = [r for r in compiled.regexes if alternative is None or r.alternatives >> alternative & 1]
    modules = {node for node in range(len(tree)) for r in asked if r.regex.fullmatch(tree.paths[node])}
    if any(r.classes or r.parameters for r in asked) and modules:
        return f"it matches the names of {len(modules)} modules, but they are of other classes"
    for node in () if any(r.parameters for r in asked) else range(len(tree)):
        for name in tree.signature(node).parameters:
            path = f"{tree.paths[node]}.{name}".lstrip(".")
            if any(r.regex.fullmatch(path) for r in asked):
                return f"a regex matches modules, and `{path}` is a parameter: end it in `/:Parameter`"
    return "no name in the model matches this regex as a whole"


class _Stop(NamedTuple):
    """Where a pattern stopped: `at` tests were met by the `reached` nodes, the next by none of their children."""

    pattern: Pattern
    at: int
    reached: Sequence[int]

    @property
    def progress(self) -> tuple[bool, float, int]:
        # Of two that got equally far, the shorter has less left to go.
        return (bool(self.reached), self.at / max(1, len(self.pattern.tests)), self.at)

    def text(self, tree: Tree) -> str:
        here = _where(tree, self.reached)
        if self.at == len(self.pattern.tests):
            return self._ending(tree, here)
        test = self.pattern.tests[self.at]
        if isinstance(test, Indices):
            return _index(tree, self.reached, test, here)
        if self.pattern.gaps[self.at]:
            names = sorted(_names_below(tree, self.reached))
            known = f"nothing below {here} is called {_said(test)}"
        else:
            names = _children(tree, self.reached)
            known = f"the children of {here} are {listed(tree, self.reached)}"
            if not names:
                return f"{here} has no children"
            if test.globs and all(index_of(name) >= 0 for name in names):
                return f"{known}, and a glob never matches an index: write a slice, `[0:4]`"
        return "; ".join(filter(None, [known, _meant(test, names)]))

    def _ending(self, tree: Tree, here: str) -> str:
        """The path is there, its class or kind is another."""
        if not self.pattern.modules:
            return f"{here} is a module, not a parameter"
        found = Counter(tree.signature(node).cls for node in self.reached)
        classes = ", ".join(f"`{name}`" for name, _ in found.most_common(4))
        asked = [name for test in self.pattern.classes for name in test.names]
        known = {name.rpartition(".")[2] for node in set(self.reached) for name in tree.signature(node).mro}
        meant = next(filter(None, (did_you_mean(name, known) for name in asked)), "")
        are = "there is" if len(self.reached) == 1 else "there are"
        text = f"{are} {here}, but of class {classes}"
        return "; ".join(filter(None, [text, meant]))


def _stop(tree: Tree, compiled: Compiled, owned: Owned) -> _Stop | None:
    """How far a pattern gets; None where it matches to the end."""
    pattern = owned.pattern
    # With no tests behind it, a pattern that floats stands everywhere, which says nothing.
    prefixes = [
        Pattern(pattern.tests[:at], (*pattern.gaps[:at], False), parameters=False)
        for at in range(1, len(pattern.tests) + 1)
    ]
    *reached, whole = _match_each(tree, compiled, [*prefixes, pattern])
    if len(whole):
        return None
    for at, hits in reversed(list(enumerate(reached, 1))):
        if hits.nodes:
            return _Stop(pattern, at, hits.nodes)
    return _Stop(pattern, 0, [0] if pattern.anchored else [])


def _match_each(tree: Tree, compiled: Compiled, patterns: Sequence[Pattern]) -> list[Hits]:
    selectors = []
    for pattern in patterns:
        one = Compiled(compiled.union, compiled.scope)
        one.patterns = [Owned(pattern, 0, 0)]
        selectors.append(one)
    return match(tree, selectors)


def _nowhere(tree: Tree, stops: Sequence[_Stop]) -> str:
    """Not even the first step is anywhere in the model."""
    tests = [stop.pattern.tests[0] for stop in stops if stop.pattern.tests]
    if not tests:
        asked = sorted({name for stop in stops for test in stop.pattern.classes for name in test.names})
        known = {name.rpartition(".")[2] for signature in tree.signatures for name in signature.mro}
        meant = next(filter(None, (did_you_mean(name.rpartition(".")[2], known) for name in asked)), "")
        text = f"no module is of class {' or '.join(f'`{name}`' for name in asked)}" if asked else "there is none"
        return "; ".join(filter(None, [text, meant]))
    names = set(tree.names) | {name for s in tree.signatures for name in s.parameters}
    said = list(dict.fromkeys(name for test in tests for name in _said(test).split(" or ")))
    meant = next(filter(None, (_meant(test, names) for test in tests)), "")
    shown = " or ".join(said[:6]) + (" or ..." if len(said) > 6 else "")
    return "; ".join(filter(None, [f"nothing in the model is called {shown}", meant]))


def _said(test: Names | Indices) -> str:
    if isinstance(test, Indices):
        return f"`[{_spans(test)}]`"
    names = sorted(test.literals) + sorted(test.globs) + (["*"] if test.anything else [])
    return " or ".join(f"`{name}`" for name in names[:6]) + (" or ..." if len(names) > 6 else "")


def _meant(test: Names | Indices, names: Iterable[str]) -> str:
    if isinstance(test, Indices):
        return ""
    known = [name for name in names if index_of(name) < 0]
    return next(filter(None, (did_you_mean(name, known) for name in sorted(test.literals))), "")


def _index(tree: Tree, reached: Sequence[int], test: Indices, here: str) -> str:
    lengths = {node: container_length(tree, node) for node in reached}
    numbered = [node for node in reached if lengths[node]]
    if not numbered:
        named = listed(tree, reached)
        return f"{here} has no numbered children" + (f"; they are {named}" if named != "none" else " (nor others)")
    said = ", ".join(f"{_where(tree, [n])} has {lengths[n]}: 0 to {lengths[n] - 1}" for n in numbered[:3])
    return f"{said}; none is `[{_spans(test)}]`"


def _spans(test: Indices) -> str:
    return ",".join(map(_span, test.spans)) if test.spans is not None else "*"


def _span(span: Bounds) -> str:
    if isinstance(span, int):
        return str(span)
    start, stop, step = ("" if bound is None else str(bound) for bound in span)
    return f"{start}:{stop}" + (f":{step}" if step else "")


# ── what stands where ──


def _where(tree: Tree, nodes: Sequence[int]) -> str:
    paths = compress(tree, nodes)
    if paths == ["^"]:
        return "the root"
    # Shown without its anchor where that says no less: the whole path is there anyway.
    said = [f"`{path.removeprefix('^')}`" for path in paths[:2]]
    return " and ".join(said) + (f" and {len(paths) - 2} more" if len(paths) > 2 else "")


def _children(tree: Tree, nodes: Sequence[int]) -> list[str]:
    """Names of what stands right below any of the nodes, modules and parameters, in order."""
    names: dict[str, None] = {}
    for node in nodes:
        names.update(dict.fromkeys(tree._children[node]))
        names.update(dict.fromkeys(tree.signature(node).parameters))
    return list(names)


def listed(tree: Tree, nodes: Sequence[int]) -> str:
    """The names of what stands right below the nodes, numbers as slices, cut where there are many."""
    names = _children(tree, nodes)
    numbers = sorted({index for name in names if (index := index_of(name)) >= 0})
    words = [name for name in names if index_of(name) < 0]
    said = ([f"[{spans_text(numbers)}]"] if numbers else []) + words[:_MOST_NAMES]
    more = len(words) - _MOST_NAMES
    return (", ".join(said) or "none") + (f" and {more} more" if more > 0 else "")


def _names_below(tree: Tree, nodes: Sequence[int]) -> set[str]:
    names: set[str] = set()
    for node in nodes:
        names.update(tree.names[node + 1 : tree.ends[node]])
        for signature in set(tree.signature_of[node : tree.ends[node]]):
            names.update(tree.signatures[signature].parameters)
    return names


# ── uneven coverage ──


def lacking(
    tree: Tree,
    groups: Sequence[int],
    hits: Iterable[int | Parameter],
    wrong: Iterable[int] | None = None,
) -> str:
    """What some groups lack that others have: `layers[5,11] have no `v_proj` (they have q_proj, k_proj, o_proj)`.

    `hits` are a rule's; `wrong` the groups to speak of (all by default). Empty where nothing sensible can be said.
    """
    inside = _relative(tree, groups, hits)
    whole = Counter(path for paths in inside.values() for path in paths)
    asked = list(groups) if wrong is None else list(wrong)
    missing: dict[tuple[str, ...], list[int]] = {}
    for group in asked:
        # What only a minority has is no rule that the others break.
        lack = [p for p, times in whole.items() if p not in inside[group] and 2 * times > len(groups) - len(asked)]
        missing.setdefault(tuple(lack), []).append(group)
    said = []
    for paths, where in missing.items():
        if paths:
            said.append(_lack(tree, where, paths))
        elif whole and any(not inside[g] for g in where):
            said.append(f"{_where(tree, where)} {'has' if len(where) == 1 else 'have'} none")
    return "; ".join(said[:4])


def _relative(tree: Tree, groups: Sequence[int], hits: Iterable[int | Parameter]) -> dict[int, dict[str, None]]:
    """The paths of the hits in each group, from the group on."""
    inside: dict[int, dict[str, None]] = {group: {} for group in groups}
    for hit in hits:
        node, tail = (hit[0], [hit[1]]) if isinstance(hit, tuple) else (hit, [])
        while node >= 0:
            if node in inside:
                inside[node][".".join(reversed(tail))] = None
            tail.append(tree.names[node])
            node = tree.parents[node]
    return inside


def _lack(tree: Tree, groups: Sequence[int], paths: Sequence[str]) -> str:
    """`layers[5]` has no `self_attn.v_proj` (`self_attn` has q_proj, k_proj)."""
    by_parent: dict[str, list[str]] = {}
    for path in paths:
        parent, _, name = path.rpartition(".")
        by_parent.setdefault(parent, []).append(name)
    said = []
    have = "has" if len(groups) == 1 else "have"
    for parent, names in list(by_parent.items())[:3]:
        holders = [node for group in groups if (node := _below(tree, group, parent)) is not None]
        there = [n for n in names if any(n in tree._children[h] or n in tree.signature(h).parameters for h in holders)]
        wanted = " or ".join(f"`{parent}.{step}`" if parent else f"`{step}`" for step in steps_text(names))
        if there:
            said.append(f"{_where(tree, groups)} {have} {wanted}, but the rule does not reach it there")
        elif holders:
            said.append(f"{_where(tree, groups)} {have} no {wanted} (they have {listed(tree, holders)})")
        else:
            said.append(f"{_where(tree, groups)} {have} no {wanted} (they have {listed(tree, groups)})")
    return "; ".join(said)


def _below(tree: Tree, node: int, path: str) -> int | None:
    for name in path.split(".") if path else ():
        found = tree._children[node].get(name)
        if found is None:
            return None
        node = found
    return node
