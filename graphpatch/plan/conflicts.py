"""Two rules on one node: an error, unless their ops compose, one rule chains them, or one says it overrides."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence

from ..lang.diagnostics import Diagnostic, Place
from ..tree.compress import compress
from ..tree.tree import Tree
from .drafts import Draft
from .rules import Rule
from .target import Hit, owner, split


def settle(tree: Tree, drafts: Sequence[Draft], findings: list[Diagnostic]) -> None:
    """Take from overridden rules what the overriding ones share with them; report what is left in conflict."""
    _override(drafts, findings)
    if sum(len(d.hits) for d in drafts) > len(set().union(*(d.hits for d in drafts))):
        findings += _shared(tree, drafts)
    findings += _below_exclusive(tree, drafts)


def _override(drafts: Sequence[Draft], findings: list[Diagnostic]) -> None:
    by_rule: dict[int, list[Draft]] = defaultdict(list)
    for draft in drafts:
        by_rule[draft.order[0]].append(draft)
    losses: list[tuple[list[Draft], set[Hit]]] = []
    for number, winners in by_rule.items():
        rule = winners[0].rule
        for label in rule.statement.overrides:  # type: ignore[union-attr]
            losers = [d for other, ds in by_rule.items() if other != number and ds[0].rule.label == label for d in ds]
            shared = {h for d in winners for h in d.hits} & {h for d in losers for h in d.hits}
            if not shared:
                findings.append(
                    rule.scope.finding(
                        "GP414",
                        f"`overrides {label}` has nothing to override",
                        rule.statement.span,
                        f"this rule and `{label}` share no target",
                        (f"leave `overrides {label}` out, or mend the selector",),
                    )
                )
            losses.append((losers, shared))
    for losers, shared in losses:
        for draft in losers:
            draft.hits = [h for h in draft.hits if h not in shared]


def _shared(tree: Tree, drafts: Sequence[Draft]) -> Iterable[Diagnostic]:
    at: dict[Hit, list[Draft]] = defaultdict(list)
    for draft in drafts:
        for hit in draft.hits:
            at[hit].append(draft)
    clashes: dict[tuple[int, int], tuple[Draft, Draft, list[Hit]]] = {}
    for hit, here in at.items():
        for i, one in enumerate(here):
            for other in here[i + 1 :]:
                if _collide(one, other):
                    key = (id(one), id(other))
                    clashes.setdefault(key, (one, other, []))[2].append(hit)
    for one, other, hits in clashes.values():
        yield _conflict(tree, one, other, hits)


def _collide(one: Draft, other: Draft) -> bool:
    alone = one.op.exclusive or other.op.exclusive or one.op.idles or other.op.idles
    return alone or bool(one.op.slots() & other.op.slots())


def _conflict(tree: Tree, one: Draft, other: Draft, hits: Sequence[Hit]) -> Diagnostic:
    paths = compress(tree, *split(hits))
    where = paths[0].removeprefix("^") + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")
    if one.rule is other.rule:
        return one.rule.scope.finding(
            "GP407",
            f"`{one.op.op}` and `{other.op.op}` of one rule cannot stand on one module",
            other.call.span,
            "one of them takes the module's place"
            if one.op.exclusive or other.op.exclusive
            else "they take the same slot",
        )
    places, text = [], []
    for draft in (one, other):
        all_shared = ", all shared" if len(draft.hits) == len(hits) else ""
        many = f"{len(draft.hits)} module{'s' * (len(draft.hits) != 1)}{all_shared}"
        span = draft.rule.statement.span
        if span:
            places.append(Place(draft.rule.scope.source, draft.call.span or span, many))
        else:
            text.append(f"{draft.op.text()}   {many}")
    label = one.rule.label or "base"
    fixes = [
        f"if the second is meant to win: `... with {other.op.text()} overrides {label}`"
        + ("" if one.rule.label else f", and name the first with `as {label}`")
    ]
    if "adapter" in type(one.op).model_fields and type(one.op) is type(other.op):
        name = other.rule.label or "second"
        fixes.append(f'if both are meant: give each an adapter name, {other.op.op}(..., adapter="{name}")')
    return Diagnostic("GP407", f"two rules change {where}", tuple(places), tuple(text), tuple(fixes))


def _below_exclusive(tree: Tree, drafts: Sequence[Draft]) -> Iterable[Diagnostic]:
    """A node may be patched below a patched one, unless the outer op replaces, wraps, drops or repeats."""
    exclusive = [d for d in drafts if d.op.exclusive]
    if not exclusive:
        return
    for outer in exclusive:
        for inner in drafts:
            owners = sorted(owner(h) for h in inner.hits)
            for hit in outer.hits:
                node = owner(hit)
                first, last = bisect_right(owners, node), bisect_left(owners, tree.ends[node])
                if first < last:
                    yield _lost(tree, outer.rule, outer, inner, node, owners[first])
                    break


def _lost(tree: Tree, rule: Rule, outer: Draft, inner: Draft, node: int, below: int) -> Diagnostic:
    places = tuple(
        Place(d.rule.scope.source, d.call.span, label)
        for d, label in (
            (outer, f"takes the place of {tree.paths[node] or 'the root'}"),
            (inner, f"changes {tree.paths[below]}, below it"),
        )
        if d.call.span
    )
    return Diagnostic(
        "GP415",
        f"`{inner.op.op}` would be lost below `{outer.op.op}`",
        places,
        fixes=(f"leave those out of the inner rule: `except {tree.paths[node]}`",),
    )
