"""The rules in force: `when` decided, `require` checked, selectors made concrete, everything matched in one pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ..lang.diagnostics import Diagnostic, Error, PlanError
from ..lang.formatter import format_expression, format_selector
from ..lang.syntax import Freeze, Map, Patch, PathSelector, Require, SelectorUnion, Statement, Step, When
from ..tree.select import Compiled, Hits, compile_selector, match
from ..tree.tree import Tree
from .scope import FileScope, World

NEW = "new"
"""`@new`, the one role that no file defines: the parameters that the patches add."""


@dataclass
class Rule:
    """A `patch`, `freeze` or `train` in force."""

    statement: Patch | Freeze
    scope: FileScope
    target: Compiled
    excepted: Compiled | None
    per: Compiled | None
    new: bool = False
    """The target names `@new`."""
    except_new: bool = False
    hits: Hits = field(init=False)
    excepted_hits: Hits | None = field(init=False, default=None)
    per_hits: Hits | None = field(init=False, default=None)

    @property
    def where(self) -> str:
        """`lora.rules:5`"""
        span = self.statement.span
        return f"{self.scope.source.name}:{span.line}" if span else self.scope.source.name

    @property
    def label(self) -> str | None:
        return self.statement.label

    def target_text(self) -> str:
        """What it acts on, as written."""
        text = format_selector(self.statement.selector)
        return f"{text} except {format_selector(self.statement.except_)}" if self.statement.except_ else text

    def selectors(self) -> list[Compiled]:
        return [c for c in (self.target, self.excepted, self.per) if c is not None]

    def take(self, hits: Iterator[Hits]) -> None:
        """Take what `match` found for `selectors()`, in that order."""
        self.hits = next(hits)
        self.excepted_hits = next(hits) if self.excepted else None
        self.per_hits = next(hits) if self.per else None


def rules_in_force(world: World) -> tuple[list[Rule], list[Rule]]:
    """The patch rules, and the freeze and train rules, in file order, used files first.

    Raises `PlanError` with every selector that cannot be made concrete and every `require` that does not hold.
    """
    patches: list[Rule] = []
    freezes: list[Rule] = []
    findings: list[Diagnostic] = []
    for file, statement in _statements(world, findings):
        if isinstance(statement, Map):
            continue
        try:
            rule = _rule(statement, world.scope(file))
        except Error as error:
            findings += error.diagnostics
            continue
        (patches if isinstance(statement, Patch) else freezes).append(rule)
    if findings:
        raise PlanError(dict.fromkeys(findings))
    return patches, freezes


def maps_in_force(world: World) -> list[tuple[FileScope, Map]]:
    """The `map` statements, in file order, each with the names that its file sees."""
    return [(world.scope(file), held) for file, held in _statements(world, []) if isinstance(held, Map)]


def match_rules(tree: Tree, rules: Sequence[Rule], added: Mapping[int, Mapping[str, object]] | None = None) -> None:
    """Match all selectors of the rules in one pass; `added` are the parameters that patches add, by node."""
    selectors = [compiled for rule in rules for compiled in rule.selectors()]
    hits = iter(match(tree, selectors, added or {}))
    for rule in rules:
        rule.take(hits)


def _statements(world: World, findings: list[Diagnostic]) -> Iterator[tuple[int, Patch | Freeze | Map]]:
    for file, statement in world.program.statements():
        yield from _unfold(world.scope(file), statement, findings)


def _unfold(
    scope: FileScope, statement: Statement, findings: list[Diagnostic]
) -> Iterator[tuple[int, Patch | Freeze | Map]]:
    if isinstance(statement, (Patch, Freeze, Map)):
        yield scope.file, statement
    elif isinstance(statement, (When, Require)):
        try:
            holds = bool(scope.value(statement.test))
        except Error as error:
            findings += error.diagnostics
            return
        if isinstance(statement, Require) and not holds:
            said = format_expression(statement.test)
            findings.append(
                scope.finding(
                    "GP440",
                    f"{scope.source.name} does not apply to this model",
                    statement.test.span,
                    f"does not hold for {scope.world.tree.title or 'this tree'}",
                    () if statement.test.span else (f"it requires {said}",),
                )
            )
        if isinstance(statement, When) and holds:
            for inner in statement.body:
                yield from _unfold(scope, inner, findings)


def _rule(statement: Patch | Freeze, scope: FileScope) -> Rule:
    selector, new = _without_new(statement.selector, scope)
    excepted, except_new = _without_new(statement.except_, scope) if statement.except_ else (None, False)
    if new and isinstance(statement, Patch):
        scope.fail(
            "GP224",
            "`@new` cannot be patched",
            statement.selector.span,
            "nothing that a patch creates is matched again",
        )
    if isinstance(statement, Freeze) and not statement.expect and not statement.where:
        selector = _shortest(selector)
    per = statement.expect.per if statement.expect else None
    return Rule(
        statement,
        scope,
        compile_selector(selector, scope),
        compile_selector(excepted, scope) if excepted and excepted.branches else None,
        compile_selector(SelectorUnion(branches=(per,), span=per.span), scope) if per else None,
        new,
        except_new,
    )


def _without_new(union: SelectorUnion, scope: FileScope) -> tuple[SelectorUnion, bool]:
    """The union less its `@new` branch, and whether it had one."""
    kept = tuple(branch for branch in union.branches if not _is_new(branch))
    for branch in kept:
        for step in branch.steps if isinstance(branch, PathSelector) else ():
            if step.kind == "role" and step.name == NEW:
                scope.fail("GP224", "`@new` stands alone", step.span, "write it as a branch of its own: ... | @new")
    return union.model_copy(update={"branches": kept}), len(kept) < len(union.branches)


def _shortest(union: SelectorUnion) -> SelectorUnion:
    """`**` as `^`: to act on all at or below every module is to act on all at or below the root."""
    everything = (Step(name="**"),)
    branches = tuple(
        PathSelector(anchored=True, span=b.span)
        if isinstance(b, PathSelector) and b.steps == everything and not b.cls
        else b
        for b in union.branches
    )
    return union.model_copy(update={"branches": branches})


def _is_new(branch: object) -> bool:
    if not isinstance(branch, PathSelector) or branch.anchored or branch.cls or len(branch.steps) != 1:
        return False
    (step,) = branch.steps
    return step.kind == "role" and step.name == NEW and step.index is None
