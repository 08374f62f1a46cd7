"""What a rule reaches: its hits after `where` and `except`, and whether every part of it did something.

Nothing is missed in silence: an alternative, a branch, a literal `except` that has no effect is an error with the
nearest miss.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ..lang.diagnostics import Diagnostic, Place, did_you_mean
from ..lang.evaluate import EvaluationError, NoneArithmetic, evaluate
from ..lang.syntax import Freeze, PathSelector, Selector
from ..tree.nearmiss import near_miss
from ..tree.select import Alternative, Compiled, Cover, Hits
from ..tree.stacks import stacks
from ..tree.tree import Parameter, Tree
from .rules import Rule
from .target import TENSOR_FACTS, Hit, TargetScope, by_difference, covered, needs, owner, split


@dataclass
class Reach:
    """The targets of one rule."""

    rule: Rule
    nodes: list[int] = field(default_factory=list)
    parameters: list[Parameter] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    """The nodes of `expect ... per`, after `except`."""
    coverage: str = ""
    excepted: Cover | None = None

    def __len__(self) -> int:
        return len(self.nodes) + len(self.parameters)

    def hits(self) -> list[Hit]:
        return [*self.nodes, *self.parameters] if self.parameters else list(self.nodes)


def reach(tree: Tree, rule: Rule, findings: list[Diagnostic]) -> Reach:
    """Work out what a matched rule reaches; what is wrong goes to `findings`."""
    result = Reach(rule)
    for hits in (rule.hits, rule.excepted_hits, rule.per_hits):
        for bad in hits.out_of_range if hits is not None else ():
            findings.append(rule.scope.finding("GP404", bad.text, bad.span))
    chosen: list[Hit] = [*rule.hits.nodes, *rule.hits.parameters] if rule.hits.parameters else list(rule.hits.nodes)
    candidates = len(chosen)
    if rule.statement.where is not None and chosen:
        before = len(findings)
        chosen = _where(tree, rule, chosen, findings)
        if not chosen and not _any(rule) and len(findings) == before:
            findings.append(_all_filtered(rule, candidates))
    if rule.hits.out_of_range or (candidates and not chosen):
        return result
    if not candidates:
        if not rule.new and not _any(rule):
            findings.append(_nothing(tree, rule))
        return result
    findings += _dead_alternatives(tree, rule, rule.target, rule.hits, chosen)
    if rule.per is not None and rule.per_hits is not None and rule.per_hits.nodes:
        findings += _dead_alternatives(tree, rule, rule.per, rule.per_hits, rule.per_hits.nodes)
    return _less_excepted(tree, rule, chosen, result, findings)


def _any(rule: Rule) -> bool:
    return rule.statement.expect is not None and rule.statement.expect.any


def _where(tree: Tree, rule: Rule, chosen: Sequence[Hit], findings: list[Diagnostic]) -> list[Hit]:
    expr = rule.statement.where
    assert expr is not None
    what = needs([expr], rule.target.captures)
    known: set[str] = set()
    kept: list[Hit] = []
    for facts, group in by_difference(tree, rule.hits, chosen, what):
        known.update(name for name in what.attributes if facts.attribute(name)[0])
        try:
            if evaluate(expr, TargetScope(rule.scope, facts, strict=False)):
                kept += group
        except NoneArithmetic:
            pass
        except EvaluationError as error:
            findings.append(rule.scope.finding("GP220", str(error), error.span or expr.span))
            return list(chosen)
    for name in sorted(what.attributes - known):
        findings.append(_unknown_attribute(tree, rule, chosen, name))
    return sorted(kept, key=_order)


def _order(hit: Hit) -> tuple[bool, Hit]:
    return (not isinstance(hit, int), hit)


def _unknown_attribute(tree: Tree, rule: Rule, chosen: Sequence[Hit], name: str) -> Diagnostic:
    if not tree.has_classes:
        why = (
            "this tree was read from safetensors headers and has no attributes; give the model's config or a .tree file"
        )
        return rule.scope.finding("GP408", f"`where {name}` cannot be judged", rule.statement.where.span, why)  # type: ignore[union-attr]
    if name in TENSOR_FACTS and not rule.hits.parameters:
        why = f"`{name}` is of parameters: write weight.{name}, or end the selector in `:Parameter`"
        return rule.scope.finding(
            "GP408",
            f"none of the {len(chosen)} candidates has an attribute `{name}`",
            rule.statement.where.span,  # type: ignore[union-attr]
            why,
        )
    has = sorted({a for s in {tree.signature_of[owner(h)] for h in chosen} for a in tree.signatures[s].attributes})
    near = did_you_mean(name, has)
    return rule.scope.finding(
        "GP408",
        f"none of the {len(chosen)} candidates has an attribute `{name}`",
        rule.statement.where.span,  # type: ignore[union-attr]
        near or f"they have {', '.join(has[:12]) or 'none'}",
    )


def _all_filtered(rule: Rule, candidates: int) -> Diagnostic:
    span = rule.statement.where.span if rule.statement.where else None
    return rule.scope.finding(
        "GP403", f"`where` is false for all {candidates} candidates", span, "", ("`expect any` if none may be left",)
    )


def _nothing(tree: Tree, rule: Rule) -> Diagnostic:
    miss = near_miss(tree, rule.target, None)
    return rule.scope.finding(
        "GP401",
        "the selector matches nothing",
        miss.span or rule.statement.selector.span,
        miss.text,
        ("`expect any` if that is right for some models",),
    )


def _dead_alternatives(
    tree: Tree, rule: Rule, compiled: Compiled, hits: Hits, chosen: Sequence[Hit]
) -> Iterable[Diagnostic]:
    """Every `{}` alternative and `|` branch of a selector that no hit took part in."""
    alternatives = compiled.alternatives
    if not alternatives:
        return
    everything, seen = (1 << len(alternatives)) - 1, 0
    for hit in chosen:
        seen |= hits.alternatives(hit)
        if seen == everything:
            return
    for at, alternative in enumerate(alternatives):
        if seen >> at & 1:
            continue
        miss = near_miss(tree, compiled, at)
        yield rule.scope.finding(
            "GP402", f"`{alternative.text}` matches nothing", alternative.span or miss.span, miss.text
        )


def _less_excepted(tree: Tree, rule: Rule, chosen: Sequence[Hit], result: Reach, findings: list[Diagnostic]) -> Reach:
    groups = list(rule.per_hits.nodes) if rule.per_hits else []
    kept: Sequence[Hit] = chosen
    if rule.excepted_hits is not None:
        cover = Cover(tree, rule.excepted_hits.nodes, rule.excepted_hits.parameters)
        result.excepted = cover
        kept = [h for h in chosen if not covered(cover, h)]
        spared = [g for g in groups if g not in cover]
        if not kept and not rule.new and not _any(rule):
            findings.append(_all_excepted(rule, len(chosen)))
        else:
            findings += _dead_excepts(tree, rule, chosen, groups)
        groups = spared
    result.nodes, result.parameters = split(kept)
    result.groups = groups
    findings += _spans_stacks(tree, rule, rule.target, kept)
    if rule.per is not None:
        findings += _spans_stacks(tree, rule, rule.per, groups)
    return result


def _spans_stacks(tree: Tree, rule: Rule, compiled: Compiled, hits: Sequence[Hit]) -> Iterable[Diagnostic]:
    """An index that counted in several stacks: two towers, encoder and decoder."""
    for spread in stacks(tree, compiled, hits):
        yield rule.scope.finding(
            "GP412",
            f"{spread.text} counts in {len(spread.containers)} stacks",
            spread.span,
            ", ".join(f"{c.hit} in {c.path} (of {c.length})" for c in spread.containers),
            ("anchor the selector with `^`, or say `except`, to choose one",),
            severity="warning",
        )


def _all_excepted(rule: Rule, count: int) -> Diagnostic:
    statement = rule.statement
    assert statement.except_ is not None
    places = tuple(
        Place(rule.scope.source, span, label)
        for span, label in (
            (statement.selector.span, f"matched {count}, and"),
            (statement.except_.span, "covers each of them"),
        )
        if span
    )
    return Diagnostic("GP406", f"all {count} matches were excluded", places)


def _dead_excepts(tree: Tree, rule: Rule, chosen: Sequence[Hit], groups: Sequence[int]) -> Iterable[Diagnostic]:
    """Every literal part of an `except` that removes nothing; one that names a role may: not every model has towers."""
    union, compiled, hits = rule.statement.except_, rule.excepted, rule.excepted_hits
    assert union is not None and compiled is not None and hits is not None
    below = _acts_below(tree, rule, chosen)
    parts: list[tuple[int | None, Alternative]] = list(enumerate(compiled.alternatives))
    parts = parts or [(None, Alternative("", union.span, 0))]
    for at, part in parts:
        if _names_role(compiled.union.branches[part.branch]):
            continue
        nodes = [n for n in hits.nodes if at is None or hits.alternatives(n) >> at & 1]
        parameters = [p for p in hits.parameters if at is None or hits.alternatives(p) >> at & 1]
        cover = Cover(tree, nodes, parameters)
        if any(covered(cover, hit) for hit in chosen) or any(group in cover for group in groups):
            continue
        if below is not None and (any(n in below for n in nodes) or any(below.covers(p) for p in parameters)):
            continue
        count = len(nodes) + len(parameters)
        why = (
            f"it covers {count} {'place' if count == 1 else 'places'}, none of them a target of this rule"
            if count
            else near_miss(tree, compiled, at).text
        )
        said = f"`{part.text}` in this `except`" if part.text else "this `except`"
        yield rule.scope.finding("GP409", f"{said} removes nothing", part.span, why, ("leave it out, or mend it",))


def _acts_below(tree: Tree, rule: Rule, chosen: Sequence[Hit]) -> Cover | None:
    """For freeze and train, which act on all at or below their hits: where an exception may lie."""
    if not isinstance(rule.statement, Freeze):
        return None
    if rule.new:
        return Cover(tree, [0])
    return Cover(tree, *split(chosen))


def _names_role(branch: Selector) -> bool:
    return isinstance(branch, PathSelector) and any(step.kind == "role" for step in branch.steps)
