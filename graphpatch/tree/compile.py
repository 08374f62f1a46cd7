"""A selector union made concrete: roles expanded, brackets evaluated, each branch as patterns.

An alternative (`{q,k}_proj`, `a | b`, `:{A,B}`) is tracked by patterns of its own: the branch narrowed to that
alternative. So whether one took part in a hit is whether its pattern accepted it, in the same pass.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from ..lang.diagnostics import Span
from ..lang.formatter import format_selector, format_step
from ..lang.syntax import RegexSelector, Selector, SelectorUnion
from .classes import ClassTest, split_class
from .expand import MOST_PATTERNS, Classes, Path, Scope, classes_of, expand, too_many
from .globs import Fixed, split_braces
from .pattern import Indices, Names, Pattern, Test


class Alternative(NamedTuple):
    """A `|` branch, or one alternative of `{}` in a step or a class: each must be in a hit. None is inside a role."""

    text: str
    """As written: `{w}` for an alternative, the branch's own text for a branch."""
    span: Span | None
    branch: int


class Owned(NamedTuple):
    """A pattern of a selector, and what it stands for there."""

    pattern: Pattern
    branch: int
    alternatives: int
    """The alternatives a hit of this pattern takes part in, as a bit mask."""
    captures: tuple[tuple[int, str], ...] = ()
    """(test, name): the test whose index is bound to the name."""
    steps: tuple[tuple[int, int], ...] = ()
    """(test, written step) of every bracket: tests of several patterns may come from one bracket."""
    choices: tuple[int, ...] = ()
    """The tests that were written with alternatives."""


class WrittenIndex(NamedTuple):
    """A bracket as written in a branch, or at a role's step there."""

    text: str
    span: Span | None


class Regex(NamedTuple):
    """A `/regex/` branch: outside the automaton, over whole paths."""

    regex: re.Pattern[str]
    branch: int
    alternatives: int
    classes: tuple[ClassTest, ...]
    modules: bool
    parameters: bool


class Compiled:
    """A selector union made concrete: roles expanded, brackets evaluated."""

    def __init__(self, union: SelectorUnion, scope: Scope):
        self.union, self.scope = union, scope
        self.alternatives: list[Alternative] = []
        self.patterns: list[Owned] = []
        self.regexes: list[Regex] = []
        self.brackets: dict[tuple[int, int], WrittenIndex] = {}
        """(branch, step) of each bracket -> how it was written."""
        self.captures: frozenset[str] = frozenset()
        """Names that every branch binds."""

    @property
    def needs_classes(self) -> bool:
        return any(p.pattern.classes and p.pattern.modules for p in self.patterns) or any(
            r.classes and r.modules for r in self.regexes
        )

    @property
    def span(self) -> Span | None:
        return self.union.span


def compile_selector(union: SelectorUnion, scope: Scope) -> Compiled:
    """Raises `Error` (GP23x, through `scope.fail`) where a role or an index stands where it cannot, and whatever the
    scope raises for an unknown role or a bound that is no integer."""
    compiled = Compiled(union, scope)
    captures = []
    for number, branch in enumerate(union.branches):
        bit = 0
        if len(union.branches) > 1:
            bit = _add(compiled, Alternative(format_selector(branch), branch.span, number))
        before = len(compiled.patterns)
        _Branch(compiled, number, bit, scope).compile(branch)
        if len(compiled.patterns) > MOST_PATTERNS:
            too_many(scope, branch.span)
        captures.append({name for owned in compiled.patterns[before:] for _, name in owned.captures})
    compiled.captures = frozenset(set.intersection(*captures)) if captures else frozenset()
    return compiled


def _add(compiled: Compiled, alternative: Alternative) -> int:
    compiled.alternatives.append(alternative)
    return 1 << (len(compiled.alternatives) - 1)


# ── one branch ──


class _Branch:
    """Compiles one branch into `compiled`."""

    def __init__(self, compiled: Compiled, number: int, bit: int, scope: Scope):
        self.compiled, self.number, self.bit, self.scope = compiled, number, bit, scope

    def compile(self, branch: Selector) -> None:
        if isinstance(branch, RegexSelector):
            self._regex(branch, self.bit, ())
            return
        for number, step in enumerate(branch.steps):
            if step.index is not None:
                self.compiled.brackets[self.number, number] = WrittenIndex(format_step(step), step.span)
        forms: list[tuple[int, dict[int, Fixed], int | None]] = []
        for number, step in enumerate(branch.steps):
            # A step built by hand has no positions.
            spans = iter(step.alternative_spans)
            for group, found in enumerate(split_braces(step.name).groups if step.kind == "glob" else ()):
                for option, text in enumerate(found):
                    span = next(spans, step.span)
                    bit = _add(self.compiled, Alternative("{" + text + "}", span, self.number))
                    forms.append((bit, {number: Fixed(group, option)}, None))
        classes, _ = split_class(branch.cls) if branch.cls else ([], False)
        for option, text in enumerate(classes if len(classes) > 1 else ()):
            bit = _add(self.compiled, Alternative(f":{text}", branch.span, self.number))
            forms.append((bit, {}, option))
        # Without alternatives there is one form; with them, the forms of any one group make up the whole.
        for bit, fixed, class_option in forms or [(0, {}, None)]:
            own = (classes_of(branch.cls, class_option),) if branch.cls else ()
            for path in expand(branch, self.scope, fixed):
                self._emit(path._replace(classes=path.classes + own), bit | self.bit)
                if len(self.compiled.patterns) > MOST_PATTERNS:
                    too_many(self.scope, branch.span)

    # ── patterns ──
    def _emit(self, path: Path, bit: int) -> None:
        if path.regex is not None:
            self._regex(path.regex, bit, path.classes)
            return
        tests: list[Test] = []
        gaps = [not path.anchored]
        captures: list[tuple[int, str]] = []
        steps: list[tuple[int, int]] = []
        choices: list[int] = []
        for element in path.elements:
            if element.test is None:
                gaps[-1] = True
                continue
            if element.choice:
                choices.append(len(tests))
            if isinstance(element.test, Indices):
                steps.append((len(tests), element.step))
                if element.capture:
                    if any(name == element.capture for _, name in captures):
                        self.scope.fail("GP236", f"`{element.capture}` is captured twice", element.span)
                    captures.append((len(tests), element.capture))
            tests.append(element.test)
            gaps.append(False)
        parameter = all(c.parameter for c in path.classes)
        tests_of_class = tuple(c.test for c in path.classes if c.test is not None)
        modules = len(tests_of_class) == len(path.classes)
        for last, parameters in _endings(path):
            pattern = Pattern(
                (*tests[:-1], last) if last is not None else tuple(tests),
                tuple(gaps),
                tests_of_class if modules else (),
                modules,
                parameter if path.classes else parameters,
            )
            self.compiled.patterns.append(
                Owned(pattern, self.number, bit, tuple(captures), tuple(steps), tuple(choices))
            )

    def _regex(self, branch: RegexSelector, bit: int, classes: Sequence[Classes]) -> None:
        """`classes` are those that the selector adds to a role that is a regex."""
        try:
            regex = re.compile(branch.pattern)
        except (re.error, OverflowError, RecursionError) as error:
            self.scope.fail("GP237", "this regex cannot be read", branch.span, str(error))
        names, _ = split_class(branch.cls) if branch.cls else ([], False)
        forms: list[tuple[int, int | None]] = [(0, None)]
        if len(names) > 1 and branch is self.compiled.union.branches[self.number]:
            forms = [
                (_add(self.compiled, Alternative(f":{name}", branch.span, self.number)), option)
                for option, name in enumerate(names)
            ]
        for own_bit, option in forms:
            asked = [*classes, *([classes_of(branch.cls, option)] if branch.cls else [])]
            tests = tuple(c.test for c in asked if c.test is not None)
            modules, parameters = len(tests) == len(asked), bool(asked) and all(c.parameter for c in asked)
            self.compiled.regexes.append(Regex(regex, self.number, bit | own_bit, tests, modules, parameters))


def _endings(path: Path) -> list[tuple[Names | None, bool]]:
    """(in place of the last test, whether parameters count): a final bare `*` or `**` is about modules only."""
    last = path.elements[-1].test if path.elements else None
    if last is None:
        return [(None, False)]
    if not isinstance(last, Names) or not last.anything or path.classes:
        return [(None, True)]
    if last.literals or last.globs:
        return [(Names(anything=True), False), (last._replace(anything=False), True)]
    return [(None, False)]
