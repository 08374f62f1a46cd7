"""The steps of a branch, with roles replaced by what they stand for: one path for each way to read them."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import NamedTuple, NoReturn, Protocol

from ..lang.diagnostics import Span
from ..lang.formatter import format_selector
from ..lang.syntax import At, Every, Expr, Index, PathSelector, RegexSelector, Selector, SelectorUnion, Step
from .classes import ClassTest, split_class
from .globs import Braced, Fixed, has_wildcard, split_braces
from .pattern import Bounds, Indices, Names, Test

MOST_PATTERNS = 4096
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


class Element(NamedTuple):
    """A test of an expanded path, or a gap (`test` None), and the written step it comes from."""

    test: Test | None
    step: int
    capture: str | None = None
    span: Span | None = None
    choice: bool = False


class Path(NamedTuple):
    """One way to expand steps: roles replaced by one of their branches."""

    elements: tuple[Element, ...] = ()
    anchored: bool = False
    classes: tuple[Classes, ...] = ()
    regex: RegexSelector | None = None
    """Only where a role is the whole selector."""


class Classes(NamedTuple):
    """A `:CLASS` as written: which module classes, and whether `Parameter` is among them."""

    test: ClassTest | None
    parameter: bool


def expand(
    branch: PathSelector,
    scope: Scope,
    fixed: Mapping[int, Fixed] | None = None,
    inside: tuple[tuple[str, int], ...] = (),
) -> list[Path]:
    """All ways to read the branch's steps, in the scope they stand in.

    `fixed` narrows a step to one of its alternatives; `inside` are the roles being expanded. Raises `Error` (GP23x).
    """
    paths = [Path(anchored=branch.anchored)]
    last = len(branch.steps) - 1
    for number, step in enumerate(branch.steps):
        if step.kind == "role":
            more = _role(step, scope, number, first=number == 0, alone=last == 0, inside=inside)
            if number < last and any(path.classes for path in more):
                scope.fail("GP232", f"`@{step.name}` ends in a class, so it comes last in a path", step.span)
            if number and any(path.anchored for path in more):
                scope.fail("GP231", f"`@{step.name}` is anchored with `^`, so it comes first in a path", step.span)
        else:
            more = [Path(_step(step, scope, number, (fixed or {}).get(number)))]
        if len(paths) * len(more) > MOST_PATTERNS:
            too_many(scope, branch.span)
        paths = [
            Path(
                before.elements + after.elements,
                before.anchored or after.anchored,
                before.classes + after.classes,
                after.regex,
            )
            for before, after in product(paths, more)
        ]
    return paths


def _step(step: Step, scope: Scope, number: int, fixed: Fixed | None) -> tuple[Element, ...]:
    if step.kind == "quoted":
        elements = [Element(Names(frozenset([step.name])), number)]
    elif step.name == "**":
        elements = [Element(None, number)]
    else:
        braced = split_braces(step.name)
        if braced.too_many:
            too_many(scope, step.span)
        elements = [Element(_names(braced, fixed), number, choice=bool(braced.groups))]
    if step.index is not None:
        elements.append(_index(step, step.index, scope, number))
    return tuple(elements)


def _index(step: Step, index: Index, scope: Scope, number: int) -> Element:
    spans: list[Bounds] = []
    for span in index.spans:
        if isinstance(span, Every):
            return Element(Indices(None), number, index.capture, index.span or step.span)
        if isinstance(span, At):
            spans.append(scope.integer(span.at))
            continue
        start, stop, stride = (
            None if bound is None else scope.integer(bound) for bound in (span.start, span.stop, span.step)
        )
        if stride == 0:
            scope.fail("GP235", "a slice cannot have step 0", span.span or index.span or step.span)
        spans.append((start, stop, stride))
    return Element(Indices(tuple(spans) or None), number, index.capture, index.span or step.span)


def _role(
    step: Step, scope: Scope, number: int, first: bool, alone: bool, inside: tuple[tuple[str, int], ...]
) -> list[Path]:
    union, home = scope.alias(step.name, step.span)
    # A role is known by its name and its text: two files may each have one of the same name.
    key = (step.name, hash(union))
    if key in inside or len(inside) >= _DEEPEST_ROLE:
        chain = " -> ".join(f"@{name}" for name, _ in (*inside, key))
        scope.fail("GP230", f"`@{step.name}` needs itself", step.span, chain)
    paths = []
    for branch in union.branches:
        paths += _role_branch(branch, step, scope, home, number, first, alone, (*inside, key))
    return paths


def _role_branch(
    branch: Selector,
    step: Step,
    scope: Scope,
    home: Scope,
    number: int,
    first: bool,
    alone: bool,
    inside: tuple[tuple[str, int], ...],
) -> list[Path]:
    said = f"`@{step.name}`"
    if isinstance(branch, RegexSelector):
        if not alone or step.index is not None:
            scope.fail("GP233", f"{said} is a regex over whole names, so it stands alone", step.span)
        return [Path(regex=branch)]
    paths = expand(branch, home, None, inside)
    if branch.cls:
        paths = [path._replace(classes=(*path.classes, classes_of(branch.cls, None))) for path in paths]
    if not branch.steps and not branch.anchored and not (alone and first):
        # `:*RMSNorm` as a step of a path is a child of that class, whatever its name.
        paths = [path._replace(elements=(Element(Names(anything=True), number),)) for path in paths]
    if step.index is None:
        return [
            path._replace(elements=tuple(e._replace(step=number, capture=None, choice=False) for e in path.elements))
            for path in paths
        ]
    indexed = []
    for path in paths:
        if path.classes or not path.elements or not isinstance(path.elements[-1].test, Names):
            why = "one of its branches does not" if len(paths) > 1 else f"it is `{format_selector(branch)}`"
            scope.fail("GP233", f"an index needs a role that ends in a name, and {said} does not", step.span, why)
        elements = [e._replace(step=number, capture=None, choice=False) for e in path.elements]
        indexed.append(path._replace(elements=(*elements, _index(step, step.index, scope, number))))
    return indexed


def classes_of(text: str, option: int | None) -> Classes:
    names, exact = split_class(text)
    if option is not None:
        names = [names[option]]
    modules = [name for name in names if name not in ("Parameter", "torch.nn.Parameter")]
    return Classes(ClassTest(tuple(modules), exact) if modules else None, len(modules) < len(names))


def _names(braced: Braced, fixed: Fixed | None) -> Names:
    globs = braced.expand(fixed)
    plain = frozenset(g for g in globs if not has_wildcard(g))
    bare = any(g and not g.strip("*") for g in globs)
    return Names(plain, frozenset(g for g in globs if g not in plain and g.strip("*")), bare)


def too_many(scope: Scope, span: Span | None) -> NoReturn:
    scope.fail("GP234", f"this stands for more than {MOST_PATTERNS} paths", span, "split it into several rules")
