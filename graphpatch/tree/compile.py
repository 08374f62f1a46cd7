"""A selector union made concrete: roles expanded, brackets evaluated, each branch as patterns.

An alternative (`{q,k}_proj`, `a | b`, `:{A,B}`) is tracked by patterns of its own: the branch narrowed to that
alternative. So whether one took part in a hit is whether its pattern accepted it, in the same pass.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import product
from typing import NamedTuple, NoReturn, Protocol

from ..lang.diagnostics import Span
from ..lang.formatter import format_selector, format_step
from ..lang.syntax import At, Every, Expr, Index, PathSelector, RegexSelector, Selector, SelectorUnion, Step
from .classes import ClassTest, split_class
from .globs import Braced, Fixed, has_wildcard, split_braces
from .pattern import Bounds, Indices, Names, Pattern, Test

_MOST_PATTERNS = 4096
_DEEPEST_ROLE = 32


class Scope(Protocol):
    """What a selector needs from where it was written: its roles, the values in its brackets, and a way to complain."""

    def alias(self, name: str, span: Span | None) -> tuple[SelectorUnion, Scope]:
        """The role's selector and the scope of the file that defines it; raises `Error` for an unknown role."""
        ...

    def integer(self, bound: Expr) -> int:
        """The value of an index bound; raises `Error` where it is no integer."""
        ...

    def fail(
        self, code: str, title: str, span: Span | None = None, label: str = "", fixes: tuple[str, ...] = ()
    ) -> NoReturn:
        """Raise an `Error` of this code that points at `span` in the text the selector stands in."""
        ...


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
        if len(compiled.patterns) > _MOST_PATTERNS:
            _too_many(scope, branch.span)
        captures.append({name for owned in compiled.patterns[before:] for _, name in owned.captures})
    compiled.captures = frozenset(set.intersection(*captures)) if captures else frozenset()
    return compiled


def _add(compiled: Compiled, alternative: Alternative) -> int:
    compiled.alternatives.append(alternative)
    return 1 << (len(compiled.alternatives) - 1)


def _too_many(scope: Scope, span: Span | None) -> NoReturn:
    scope.fail(
        "GP234", f"this selector stands for more than {_MOST_PATTERNS} paths", span, "split it into several rules"
    )


# ── one branch ──


class _Element(NamedTuple):
    """A test of an expanded path, or a gap (`test` None), and the written step it comes from."""

    test: Test | None
    step: int
    capture: str | None = None
    span: Span | None = None
    choice: bool = False


class _Path(NamedTuple):
    """One way to expand steps: roles replaced by one of their branches."""

    elements: tuple[_Element, ...] = ()
    anchored: bool = False
    classes: tuple[_Classes, ...] = ()
    regex: RegexSelector | None = None
    """Only where a role is the whole selector."""


class _Classes(NamedTuple):
    """A `:CLASS` as written: which module classes, and whether `Parameter` is among them."""

    test: ClassTest | None
    parameter: bool


class _Branch:
    """Compiles one branch into `compiled`."""

    def __init__(self, compiled: Compiled, number: int, bit: int, scope: Scope):
        self.compiled, self.number, self.bit, self.scope = compiled, number, bit, scope

    def compile(self, branch: Selector) -> None:
        if isinstance(branch, RegexSelector):
            self._regex(branch, self.bit, ())
            return
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
            own = (self._classes(branch.cls, class_option),) if branch.cls else ()
            for path in self._expand(branch, self.scope, fixed, ()):
                self._emit(path._replace(classes=path.classes + own), bit | self.bit)
                if len(self.compiled.patterns) > _MOST_PATTERNS:
                    _too_many(self.scope, branch.span)

    # ── expansion ──
    def _expand(
        self,
        branch: PathSelector,
        scope: Scope,
        fixed: dict[int, Fixed],
        inside: tuple[tuple[str, int], ...],
    ) -> list[_Path]:
        """All ways to read the branch's steps, in the scope they stand in; `inside` are the roles being expanded."""
        paths = [_Path(anchored=branch.anchored)]
        last = len(branch.steps) - 1
        for number, step in enumerate(branch.steps):
            if step.kind == "role":
                more = self._role(step, scope, number, first=number == 0, alone=last == 0, inside=inside)
                if number < last and any(path.classes for path in more):
                    self._fail(scope, "GP232", f"`@{step.name}` ends in a class, so it comes last in a path", step.span)
                if number and any(path.anchored for path in more):
                    self._fail(
                        scope, "GP231", f"`@{step.name}` is anchored with `^`, so it comes first in a path", step.span
                    )
            else:
                more = [_Path(self._step(step, scope, number, fixed.get(number)))]
            if len(paths) * len(more) > _MOST_PATTERNS:
                _too_many(self.scope, branch.span)
            paths = [
                _Path(
                    before.elements + after.elements,
                    before.anchored or after.anchored,
                    before.classes + after.classes,
                    after.regex,
                )
                for before, after in product(paths, more)
            ]
            if step.index is not None and not inside:
                self._note_bracket(number, step)
        return paths

    def _step(self, step: Step, scope: Scope, number: int, fixed: Fixed | None) -> tuple[_Element, ...]:
        if step.kind == "quoted":
            elements = [_Element(Names(frozenset([step.name])), number)]
        elif step.name == "**":
            elements = [_Element(None, number)]
        else:
            braced = split_braces(step.name)
            if braced.too_many:
                _too_many(scope, step.span)
            elements = [_Element(_names(braced, fixed), number, choice=bool(braced.groups))]
        if step.index is not None:
            elements.append(self._index(step, step.index, scope, number))
        return tuple(elements)

    def _index(self, step: Step, index: Index, scope: Scope, number: int) -> _Element:
        spans: list[Bounds] = []
        for span in index.spans:
            if isinstance(span, Every):
                return _Element(Indices(None), number, index.capture, index.span or step.span)
            if isinstance(span, At):
                spans.append(scope.integer(span.at))
                continue
            start, stop, stride = (
                None if bound is None else scope.integer(bound) for bound in (span.start, span.stop, span.step)
            )
            if stride == 0:
                self._fail(scope, "GP235", "a slice cannot have step 0", span.span or index.span or step.span)
            spans.append((start, stop, stride))
        return _Element(Indices(tuple(spans) or None), number, index.capture, index.span or step.span)

    def _role(
        self, step: Step, scope: Scope, number: int, first: bool, alone: bool, inside: tuple[tuple[str, int], ...]
    ) -> list[_Path]:
        union, home = scope.alias(step.name, step.span)
        # A role is known by its name and its text: two files may each have one of the same name.
        key = (step.name, hash(union))
        if key in inside or len(inside) >= _DEEPEST_ROLE:
            chain = " -> ".join(f"@{name}" for name, _ in (*inside, key))
            self._fail(scope, "GP230", f"`@{step.name}` needs itself", step.span, chain)
        paths = []
        for branch in union.branches:
            paths += self._role_branch(branch, step, scope, home, number, first, alone, (*inside, key))
        return paths

    def _role_branch(
        self,
        branch: Selector,
        step: Step,
        scope: Scope,
        home: Scope,
        number: int,
        first: bool,
        alone: bool,
        inside: tuple[tuple[str, int], ...],
    ) -> list[_Path]:
        said = f"`@{step.name}`"
        if isinstance(branch, RegexSelector):
            if not alone or step.index is not None:
                self._fail(scope, "GP233", f"{said} is a regex over whole names, so it stands alone", step.span)
            return [_Path(regex=branch)]
        paths = self._expand(branch, home, {}, inside)
        if branch.cls:
            paths = [path._replace(classes=(*path.classes, self._classes(branch.cls, None))) for path in paths]
        if not branch.steps and not branch.anchored and not (alone and first):
            # `:*RMSNorm` as a step of a path is a child of that class, whatever its name.
            paths = [path._replace(elements=(_Element(Names(anything=True), number),)) for path in paths]
        if step.index is None:
            return [
                path._replace(
                    elements=tuple(e._replace(step=number, capture=None, choice=False) for e in path.elements)
                )
                for path in paths
            ]
        indexed = []
        for path in paths:
            if path.classes or not path.elements or not isinstance(path.elements[-1].test, Names):
                why = "one of its branches does not" if len(paths) > 1 else f"it is `{format_selector(branch)}`"
                self._fail(
                    scope, "GP233", f"an index needs a role that ends in a name, and {said} does not", step.span, why
                )
            elements = [e._replace(step=number, capture=None, choice=False) for e in path.elements]
            indexed.append(path._replace(elements=(*elements, self._index(step, step.index, scope, number))))
        return indexed

    def _classes(self, text: str, option: int | None) -> _Classes:
        names, exact = split_class(text)
        if option is not None:
            names = [names[option]]
        modules = [name for name in names if name not in ("Parameter", "torch.nn.Parameter")]
        return _Classes(ClassTest(tuple(modules), exact) if modules else None, len(modules) < len(names))

    def _note_bracket(self, number: int, step: Step) -> None:
        text = format_step(step)
        self.compiled.brackets.setdefault((self.number, number), WrittenIndex(text, step.span))

    # ── patterns ──
    def _emit(self, path: _Path, bit: int) -> None:
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
                        self._fail(self.scope, "GP236", f"`{element.capture}` is captured twice", element.span)
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

    def _regex(self, branch: RegexSelector, bit: int, classes: Sequence[_Classes]) -> None:
        try:
            regex = re.compile(branch.pattern)
        except (re.error, OverflowError, RecursionError) as error:
            self._fail(self.scope, "GP237", "this regex cannot be read", branch.span, str(error))
        names, _ = split_class(branch.cls) if branch.cls else ([], False)
        options: list[tuple[int, int | None]] = [(0, None)]
        if len(names) > 1:
            options = [
                (_add(self.compiled, Alternative(":" + name, branch.span, self.number)), at)
                for at, name in enumerate(names)
            ]
        for option_bit, option in options:
            all_classes = [*classes, *([self._classes(branch.cls, option)] if branch.cls else [])]
            tests = tuple(c.test for c in all_classes if c.test is not None)
            self.compiled.regexes.append(
                Regex(
                    regex,
                    self.number,
                    bit | option_bit,
                    tests,
                    modules=len(tests) == len(all_classes),
                    parameters=bool(all_classes) and all(c.parameter for c in all_classes),
                )
            )

    def _fail(self, scope: Scope, code: str, title: str, span: Span | None, label: str = "") -> NoReturn:
        scope.fail(code, title, span, label)


def _endings(path: _Path) -> list[tuple[Names | None, bool]]:
    """(in place of the last test, whether parameters count): a final bare `*` or `**` is about modules only."""
    last = path.elements[-1].test if path.elements else None
    if last is None:
        return [(None, False)]
    if not isinstance(last, Names) or not last.anything or path.classes:
        return [(None, True)]
    if last.literals or last.globs:
        return [(Names(anything=True), False), (last._replace(anything=False), True)]
    return [(None, False)]


def _names(braced: Braced, fixed: Fixed | None) -> Names:
    globs = braced.expand(fixed)
    plain = frozenset(g for g in globs if not has_wildcard(g))
    bare = any(g and not g.strip("*") for g in globs)
    return Names(plain, frozenset(g for g in globs if g not in plain and g.strip("*")), bare)
