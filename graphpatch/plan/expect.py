"""`expect`: the coverage a rule states, held against what it reached."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import eq, ge, gt, le, lt, ne

from ..lang.diagnostics import Diagnostic
from ..lang.formatter import format_selector
from ..tree.compress import compress
from ..tree.nearmiss import lacking, near_miss
from ..tree.select import Cover
from ..tree.tree import Tree
from .reach import Reach, reach
from .rules import Rule
from .target import Hit, owner, split

_COMPARE: dict[str, Callable[[int, int], bool]] = {"==": eq, "!=": ne, "<": lt, "<=": le, ">": gt, ">=": ge}


def reach_all(tree: Tree, rules: Iterable[Rule], findings: list[Diagnostic]) -> list[Reach]:
    """What every rule reaches, and whether what it expects holds; what is wrong goes to `findings`."""
    reached = []
    for rule in rules:
        before = len(findings)
        one = reach(tree, rule, findings)
        if not any(f.severity == "error" for f in findings[before:]):
            findings += hold(tree, one)
        reached.append(one)
    return reached


def hold(tree: Tree, reached: Reach) -> Iterable[Diagnostic]:
    """The findings where `expect` does not hold; sets `reached.coverage`."""
    rule = reached.rule
    expect = rule.statement.expect
    if expect is None or expect.count is None or (expect.any and not len(reached)):
        return
    wanted = rule.scope.integer(expect.count, "what `expect` counts")
    compare = _COMPARE[expect.cmp]
    said = f"{'' if expect.cmp == '==' else expect.cmp + ' '}{wanted}"
    if expect.per is None:
        reached.coverage = str(len(reached))
        if not compare(len(reached), wanted):
            yield rule.scope.finding(
                "GP405", f"expected {said}, found {len(reached)}", expect.span, _where_they_are(tree, reached)
            )
        return
    per = format_selector(expect.per)
    if not reached.groups:
        assert rule.per is not None and rule.per_hits is not None
        why = "the `except` covers all of them" if rule.per_hits.nodes else near_miss(tree, rule.per, None).text
        yield rule.scope.finding("GP411", f"`per {per}` matches no module to count in", expect.per.span, why)
        return
    counts, outside = _count(tree, reached)
    if outside:
        paths = compress(tree, *split(outside))
        yield rule.scope.finding(
            "GP413",
            f"{len(outside)} of {len(reached)} matches are outside every `{per}`",
            expect.span,
            ", ".join(paths[:3]) + (", ..." if len(paths) > 3 else ""),
            ("narrow the selector, say `except`, or widen `per`",),
        )
    wrong = [group for group, count in zip(reached.groups, counts, strict=True) if not compare(count, wanted)]
    if wrong:
        yield _uneven(tree, reached, counts, wrong, said, per)
    reached.coverage = " + ".join(f"{n} x {times}" for n, times in sorted(Counter(counts).items(), reverse=True))


def _count(tree: Tree, reached: Reach) -> tuple[list[int], list[Hit]]:
    """Hits in (or at) each group, and the hits outside every group."""
    hits = reached.hits()
    if tree.edges:
        # A module with several paths is inside all that stands above any of them.
        places = defaultdict(list)
        for node, parent, _ in tree.edges:
            places[node].append(parent)
        inside = dict.fromkeys(reached.groups, 0)
        outside = []
        for hit in hits:
            above = [group for group in _above(tree, owner(hit), places) if group in inside]
            for group in above:
                inside[group] += 1
            if not above:
                outside.append(hit)
        return list(inside.values()), outside
    owners = sorted(owner(h) for h in hits)
    counts = [bisect_left(owners, tree.ends[g]) - bisect_left(owners, g) for g in reached.groups]
    everything = Cover(tree, reached.groups)
    return counts, [h for h in hits if owner(h) not in everything]


def _above(tree: Tree, node: int, places: Mapping[int, Sequence[int]]) -> set[int]:
    """The node and all that it stands in, over every path."""
    seen, open_ = {node}, [node]
    while open_:
        at = open_.pop()
        for parent in (tree.parents[at], *places.get(at, ())):
            if parent >= 0 and parent not in seen:
                seen.add(parent)
                open_.append(parent)
    return seen


def _uneven(tree: Tree, reached: Reach, counts: Sequence[int], wrong: Sequence[int], said: str, per: str) -> Diagnostic:
    expect = reached.rule.statement.expect
    assert expect is not None
    wrong_set = set(wrong)
    found = Counter(c for g, c in zip(reached.groups, counts, strict=True) if g in wrong_set)
    tally = ", ".join(f"found {n} in {times} of {len(reached.groups)}" for n, times in found.most_common(3))
    fewest = min(counts)
    fixes = []
    if expect.cmp == "==" and max(counts) > 0:
        right = "if that is right for this model"
        few = ", ".join(compress(tree, list(wrong))[:2])
        fixes.append(
            f"{right}: `expect >= {fewest} per {per}`, or give those a rule of their own"
            if fewest
            else f"{right}, leave {few} out with an `except`"
        )
    why = lacking(tree, reached.groups, reached.hits(), wrong)
    return reached.rule.scope.finding("GP405", f"expected {said} per {per}, {tally}", expect.span, why, tuple(fixes))


def _where_they_are(tree: Tree, reached: Reach) -> str:
    paths = compress(tree, reached.nodes, reached.parameters)
    return "found " + ", ".join(paths[:4]) + (", ..." if len(paths) > 4 else "") if paths else ""
