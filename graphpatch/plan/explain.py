"""Which rules touch a module, and where each other one stopped matching."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING

from ..lang.diagnostics import Diagnostic, PlanError, did_you_mean
from ..lang.formatter import format_expression, format_selector
from ..lang.syntax import Every, Freeze, Index, Patch, PathSelector, RegexSelector, Selector, SelectorUnion
from ..tree.nearmiss import listed
from ..tree.select import Cover, compile_selector, match
from ..tree.tree import Tree
from .drafts import drafts
from .reach import Reach, reach
from .rules import Rule, match_rules, rules_in_force
from .ruleset import RuleSet, load
from .scope import World
from .target import Hit, covered, owner

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Verdict:
    """What one rule says of the module."""

    rule: str
    """`lora.rules:5`"""
    touches: bool
    text: str
    """What it does there, or where it stopped."""


@dataclass(frozen=True)
class Explanation:
    """All rules in force, about one module or parameter. `str()` is for people."""

    path: str
    what: str
    verdicts: tuple[Verdict, ...]
    carries: tuple[str, ...] = ()
    """Ops that the model carries there already."""

    @property
    def touched_by(self) -> list[str]:
        return [v.rule for v in self.verdicts if v.touches]

    def to_json(self) -> dict[str, object]:
        return {
            "path": self.path,
            "what": self.what,
            "carries": list(self.carries),
            "rules": [{"rule": v.rule, "touches": v.touches, "text": v.text} for v in self.verdicts],
        }

    def __str__(self) -> str:
        lines = [f"{self.path or 'the root'}  ({self.what})"]
        lines += [f"  = {text}" for text in self.carries]
        lines += [f"  {'~' if v.touches else ' '} {v.rule:<16} {v.text}" for v in self.verdicts]
        return "\n".join(lines)


def explain(model_or_tree: torch.nn.Module | Tree, rules: RuleSet | str | PathLike[str], path: str) -> Explanation:
    """Which rules touch the module (or parameter) at `path`, and where the others stopped matching.

    `path` is written as `named_modules` has it, or as a plan does: `^model.layers[3].mlp`.

    Raises `PlanError` (GP441) for a path that does not exist; rules that do not fit the model are no error here.
    """
    tree = model_or_tree if isinstance(model_or_tree, Tree) else Tree.of(model_or_tree)
    rules = rules if isinstance(rules, RuleSet) else load(rules)
    hit = _find(tree, re.sub(r"\[(\d+)\]", r".\1", path.removeprefix("^")))
    patches, freezes = rules_in_force(World(rules.program, tree))
    match_rules(tree, patches)
    match_rules(tree, freezes)
    verdicts = [*_patch_verdicts(tree, patches, hit), *(_freeze_verdict(tree, rule, hit) for rule in freezes)]
    signature = tree.signature(owner(hit))
    if isinstance(hit, int):
        what, first = signature.cls or "no class", tree.paths[hit]
    else:
        tensor = signature.parameters[hit[1]]
        what, first = f"parameter {list(tensor.shape)} {tensor.dtype}", tree.parameter_paths(hit)[0]
    carries = tuple(f"{m.rule} put {m.op} here" for m in tree.marks.get(owner(hit), ()))
    return Explanation(first, what, tuple(verdicts), carries)


def _find(tree: Tree, path: str) -> Hit:
    node = tree.find(path)
    if node is not None:
        return node
    parameter = tree.find_parameter(path)
    if parameter is not None:
        return parameter
    parts = path.split(".")
    at, depth = 0, 0
    while depth < len(parts) and (below := tree.find(".".join(parts[: depth + 1]))) is not None:
        at, depth = below, depth + 1
    names = [tree.names[child] for child in tree.children(at)] + list(tree.signature(at).parameters)
    near = "" if parts[depth].isdigit() else did_you_mean(parts[depth], names)
    where = tree.paths[at] or "the root"
    raise PlanError(
        Diagnostic(
            "GP441",
            f"there is no `{path}` in this model",
            text=(f"{where} has no `{parts[depth]}`; it has {listed(tree, [at]) if names else 'no children'}",),
            fixes=(near,) if near else (),
        )
    )


def _patch_verdicts(tree: Tree, rules: list[Rule], hit: Hit) -> Iterator[Verdict]:
    reached = [reach(tree, rule, []) for rule in rules]
    winners = {
        label: one
        for one in reached
        if isinstance(one.rule.statement, Patch) and _has(one, hit)
        for label in one.rule.statement.overrides
    }
    for one in reached:
        rule = one.rule
        assert isinstance(rule.statement, Patch)
        if not _has(one, hit):
            yield Verdict(rule.where, False, _why_not(tree, one, hit))
        elif rule.label in winners:
            yield Verdict(
                rule.where, False, f"matches, but {winners[rule.label].rule.where} overrides `{rule.label}` here"
            )
        else:
            only = Reach(rule, [hit] if isinstance(hit, int) else [], [] if isinstance(hit, int) else [hit])
            made = drafts(tree, [only], None, [])
            yield Verdict(rule.where, True, " then ".join(d.op.text() for d in made) or "matches")


def _has(one: Reach, hit: Hit) -> bool:
    return hit in one.nodes if isinstance(hit, int) else hit in one.parameters


def _why_not(tree: Tree, one: Reach, hit: Hit) -> str:
    rule = one.rule
    matched = hit in (rule.hits.nodes if isinstance(hit, int) else rule.hits.parameters)
    if not matched:
        return "; ".join(_stopped(tree, rule, branch, hit) for branch in rule.target.union.branches)
    excepted = rule.statement.except_
    if excepted is not None and one.excepted is not None and covered(one.excepted, hit):
        return f"matches, but `except {format_selector(excepted)}` covers it"
    assert rule.statement.where is not None
    return f"matches, but `where {format_expression(rule.statement.where)}` is false for it"


def _stopped(tree: Tree, rule: Rule, branch: Selector, hit: Hit) -> str:
    """How far a selector gets on the way to a node: its longest beginning that matches the node or one above it."""
    said = format_selector(branch)
    if isinstance(branch, RegexSelector):
        return f"{said} does not match the whole path"
    line = set(tree.ancestors(owner(hit)))
    if branch.cls and branch.steps:
        bare = branch.model_copy(update={"cls": None})
        if hit in _hits(tree, rule, bare):
            return f"the path matches, but {tree.signature(owner(hit)).cls or 'it'} is no {branch.cls}"
    if branch.cls and not branch.steps:
        return f"{tree.signature(owner(hit)).cls or 'it'} is no {branch.cls}"
    for length in range(len(branch.steps) - 1, -1, -1):
        begin = branch.model_copy(update={"steps": branch.steps[:length], "cls": None})
        below = [h for h in _hits(tree, rule, begin) if owner(h) in line] if length else []
        if below or not length:
            left_out = _left_out(tree, rule, branch, length, line)
            if left_out:
                return left_out
        if below:
            rest = format_selector(PathSelector(steps=branch.steps[length:], cls=branch.cls))
            reached = max(owner(h) for h in below)
            return f"`{format_selector(begin)}` matches {tree.paths[reached] or 'the root'}, then `{rest}` does not"
    return f"`{said}` matches nothing on the way to it"


def _left_out(tree: Tree, rule: Rule, branch: PathSelector, at: int, line: set[int]) -> str:
    """Whether it is the index of this step that stops the selector: `layers[:-8]` leaves out model.layers.30."""
    step = branch.steps[at]
    if step.index is None:
        return ""
    written = branch.model_copy(update={"steps": branch.steps[: at + 1], "cls": None})
    any_index = step.model_copy(update={"index": Index(spans=(Every(),))})
    relaxed = written.model_copy(update={"steps": (*branch.steps[:at], any_index)})
    there = [owner(h) for h in _hits(tree, rule, relaxed) if owner(h) in line]
    return f"`{format_selector(written)}` leaves out {tree.paths[max(there)]}" if there else ""


def _hits(tree: Tree, rule: Rule, selector: Selector) -> set[Hit]:
    (hits,) = match(tree, [compile_selector(SelectorUnion(branches=(selector,)), rule.scope)])
    return {*hits.nodes, *hits.parameters}


def _freeze_verdict(tree: Tree, rule: Rule, hit: Hit) -> Verdict:
    one = reach(tree, rule, [])
    statement = rule.statement
    assert isinstance(statement, Freeze)
    verb = "trains" if statement.trainable else "freezes"
    cover = Cover(tree, one.nodes, one.parameters)
    excepted = rule.excepted_hits
    spared = Cover(tree, excepted.nodes, excepted.parameters) if excepted else None
    if not covered(cover, hit):
        return Verdict(rule.where, False, f"{verb} `{rule.target_text()}`, which does not cover it")
    if spared is not None and covered(spared, hit):
        return Verdict(rule.where, False, f"{verb} `{rule.target_text()}`, but its `except` covers this")
    note = " (what patches add is excepted)" if rule.except_new else ""
    return Verdict(rule.where, True, f"{verb} its parameters{note}" if isinstance(hit, int) else f"{verb} it")
