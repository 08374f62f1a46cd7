"""Whether every name in a program means something: roles, params, captures, labels, functions.

Everything that can be told without a model is told here, with its place and the nearest name there is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from . import syntax as s
from .diagnostics import Diagnostic, Place, RuleError, Span, did_you_mean
from .evaluate import FUNCTIONS, Constants, EvaluationError, evaluate
from .values import check_type

if TYPE_CHECKING:
    from .program import Program

NEW = "new"
"""`@new`, the role that no file defines: what the patches add."""


def check_names(program: Program) -> list[Diagnostic]:
    """All that is wrong with the names of a program; codes GP205, GP207, GP213 to GP229, GP240 to GP242."""
    check = _Check(program)
    check.twice()
    for file in range(len(program.files)):
        _File(check, file).run()
    if not check.findings:
        check.circles()
    return check.findings


class _Check:
    def __init__(self, program: Program):
        self.program = program
        self.findings: list[Diagnostic] = []

    def fail(
        self, code: str, title: str, file: int, span: Span | None, label: str = "", *more: tuple[int, Span | None, str]
    ) -> None:
        marks = [(file, span, label), *more]
        places = tuple(Place(self.program.source(f), at, words) for f, at, words in marks if at)
        fixes = () if span or not label else (label,)
        self.findings.append(Diagnostic(code, title, places, fixes=fixes))

    def twice(self) -> None:
        """Names that two statements define."""
        seen: dict[tuple[str, str], tuple[int, Span | None]] = {}
        for file, loaded in enumerate(self.program.files):
            for kind, name, span in _defined(loaded.rules.statements):
                if (kind, name) in seen:
                    here, first = (file, span), seen[kind, name]
                    if loaded.packaged and not self.program.files[first[0]].packaged:
                        here, first = first, here  # the name to change is the one in the user's own file
                    what = {
                        "alias": f"the role `@{name}`",
                        "param": f"the param `{name}`",
                        "label": f"the label `{name}`",
                    }[kind]
                    self.fail(
                        "GP219",
                        f"{what} is defined twice",
                        *here,
                        "choose another name",
                        (*first, "here too"),
                    )
                else:
                    seen[kind, name] = (file, span)

    def circles(self) -> None:
        """Roles and defaults that need themselves."""
        program = self.program
        roles: dict[str, tuple[int, s.Alias, list[str]]] = {}
        params: dict[str, tuple[int, s.Param, list[str]]] = {}
        for file, loaded in enumerate(program.files):
            for statement in loaded.rules.statements:
                if isinstance(statement, s.Alias):
                    steps = [n for n in walk(statement.selector) if isinstance(n, s.Step) and n.kind == "role"]
                    roles[statement.name] = (file, statement, [step.name for step in steps])
                elif isinstance(statement, s.Param):
                    used = [n.name for n in walk(statement.default) if isinstance(n, s.Var)]
                    params[statement.name] = (file, statement, used)
        for table, sign, what in ((roles, "@", "the role"), (params, "$", "the default of")):
            for circle in _circles({name: needs for name, (_, _, needs) in table.items()}):
                file, statement, _ = table[circle[0]]
                chain = " -> ".join(sign + name for name in (*circle, circle[0]))
                self.fail("GP221", f"{what} `{circle[0]}` needs itself", file, statement.name_span, chain)


def _circles(graph: dict[str, list[str]]) -> Iterator[list[str]]:
    """Each circle of names once."""
    done: set[str] = set()
    for start in graph:
        path: list[str] = []
        stack: list[tuple[str, Iterator[str]]] = []
        if start not in done:
            stack.append((start, iter(graph[start])))
            path.append(start)
        while stack:
            _, following = stack[-1]
            for other in following:
                if other in path:
                    yield path[path.index(other) :]
                elif other in graph and other not in done:
                    stack.append((other, iter(graph[other])))
                    path.append(other)
                    break
            else:
                stack.pop()
                done.add(path.pop())


def _defined(statements: Sequence[Any]) -> Iterator[tuple[str, str, Span | None]]:
    for statement in statements:
        if isinstance(statement, (s.Alias, s.Param)):
            yield statement.kind, statement.name, statement.name_span
        elif isinstance(statement, (s.Patch, s.Freeze)) and statement.label is not None:
            yield "label", statement.label, statement.label_span
        elif isinstance(statement, s.When):
            yield from _defined(statement.body)


def walk(node: Any) -> Iterator[Any]:
    """All nodes at and below one, in the order of the text."""
    stack = [node]
    while stack:
        node = stack.pop()
        if isinstance(node, s.Node):
            yield node
            stack += [getattr(node, name) for name in reversed(type(node).model_fields)]
        elif isinstance(node, tuple):
            stack += reversed(node)


class _File:
    """The names of one file."""

    def __init__(self, check: _Check, file: int):
        self.check, self.file, self.program = check, file, check.program
        seen = check.program.visible(file)
        self.roles = {n: x for n, (f, x) in check.program._aliases.items() if f in seen}
        self.params = {n: x for n, (f, x) in check.program._params.items() if f in seen}
        self.labels = {
            name for f in seen for kind, name, _ in _defined(check.program.files[f].rules.statements) if kind == "label"
        }

    def fail(self, code: str, title: str, span: Span | None, label: str = "") -> None:
        self.check.fail(code, title, self.file, span, label)

    def run(self) -> None:
        loaded = self.program.files[self.file]
        uses = iter(loaded.uses)
        for statement in loaded.rules.statements:
            if isinstance(statement, s.Use):
                self.use(statement, next(uses))
            else:
                self.statement(statement)

    # ── statements ──

    def use(self, use: s.Use, used: int) -> None:
        own = {x.name: x for x in self.program.files[used].rules.statements if isinstance(x, s.Param)}
        for arg in use.args:
            self.from_config(arg.value)
            if arg.name not in own:
                known = did_you_mean(arg.name or "", own) or f"it has {', '.join(own) or 'none'}"
                self.fail("GP214", f"`{use.target}` has no param `{arg.name}`", arg.name_span or arg.span, known)
            else:
                self.constant(arg.value, own[arg.name])

    def statement(self, statement: Any) -> None:
        if isinstance(statement, s.Param):
            if statement.default is not None:
                self.from_config(statement.default)
                self.constant(statement.default, statement)
        elif isinstance(statement, s.Alias):
            if statement.name == NEW:
                self.fail(
                    "GP117", "`@new` is the role of what the patches add", statement.name_span, "choose another name"
                )
            self.selector(statement.selector)
        elif isinstance(statement, s.Require):
            self.from_config(statement.test)
        elif isinstance(statement, s.When):
            self.from_config(statement.test)
            for inner in statement.body:
                self.statement(inner)
        elif isinstance(statement, s.Map):
            self.map(statement)
        else:
            self.rule(statement)

    def rule(self, rule: s.Patch | s.Freeze) -> None:
        captures = [self.captures(branch) for branch in rule.selector.branches]
        self.selector(rule.selector)
        if rule.except_ is not None:
            self.selector(rule.except_)
        if rule.where is not None:
            self.of_target(rule.where, captures, rule.selector)
        if rule.expect is not None:
            if rule.expect.count is not None:
                self.from_config(rule.expect.count)
            if rule.expect.per is not None:
                self.selector(rule.expect.per)
        if isinstance(rule, s.Patch):
            for op in rule.ops:
                self.args(op, captures, rule.selector)
            for label, span in zip(rule.overrides, rule.overrides_spans or (None,) * len(rule.overrides)):
                if label == rule.label:
                    self.fail("GP240", f"the rule `{label}` overrides itself", span, "name the other rule")
                elif label not in self.labels:
                    near = did_you_mean(label, self.labels - {rule.label})
                    known = near or "a rule gets its label from `as NAME`"
                    self.fail("GP241", f"no rule is called `{label}`", span, known)

    def map(self, statement: s.Map) -> None:
        captured = {k.index.capture for k in statement.source if k.index is not None and k.index.capture}
        for key in statement.source:
            if key.index is not None:
                self.bounds(key.index)
        for key in statement.target or ():
            if key.at is not None:
                self.expression(key.at, captured, attributes=True, ops=False)
        if statement.using is not None:
            for arg in statement.using.args:
                self.expression(arg.value, captured, attributes=True, ops=True)

    # ── selectors ──

    def captures(self, branch: Any) -> set[str]:
        """The names that one branch captures."""
        found: set[str] = set()
        for step in branch.steps if isinstance(branch, s.PathSelector) else ():
            if step.index is None or step.index.capture is None:
                continue
            name = step.index.capture
            if name in found:
                self.fail(
                    "GP223", f"`{name}` is captured twice in one selector", step.index.span, "choose another name"
                )
            elif name in self.params:
                self.fail(
                    "GP223", f"`{name}` is a param and cannot be captured too", step.index.span, "choose another name"
                )
            found.add(name)
        return found

    def selector(self, node: s.SelectorUnion | s.PathSelector | s.RegexSelector) -> None:
        for branch in node.branches if isinstance(node, s.SelectorUnion) else (node,):
            if not isinstance(branch, s.PathSelector):
                continue
            for position, step in enumerate(branch.steps):
                if step.index is not None:
                    self.bounds(step.index)
                if step.kind == "role":
                    self.role(step, position == 0 and not branch.anchored, position == len(branch.steps) - 1)

    def bounds(self, index: s.Index) -> None:
        for node in index.spans:
            bounds = (
                [node.at]
                if isinstance(node, s.At)
                else [node.start, node.stop, node.step]
                if isinstance(node, s.Range)
                else []
            )
            for bound in bounds:
                if bound is not None:
                    self.from_config(bound)

    def role(self, step: s.Step, first: bool, last: bool) -> None:
        if step.name == NEW:
            return
        alias = self.roles.get(step.name)
        if alias is None:
            known = did_you_mean(step.name, self.roles)
            elsewhere = step.name in self.program._aliases
            if not known and elsewhere:
                known = "another file defines it: `use` that file here"
            known = known or (
                "`use roles` brings the packaged ones" if not self.roles else f"there are {_some(self.roles)}"
            )
            self.fail("GP213", f"there is no role `@{step.name}`", step.name_span or step.span, known)
            return
        for branch in alias.selector.branches:
            if isinstance(branch, s.RegexSelector):
                if step.index is not None or not (first and last):
                    self.fail(
                        "GP242",
                        f"`@{step.name}` has a regex, so it stands alone",
                        step.span,
                        "write its names as selectors",
                    )
                continue
            tail = branch.steps[-1] if branch.steps else None
            if branch.anchored and not first:
                self.fail(
                    "GP242", f"`@{step.name}` is anchored, so it comes first in a path", step.span, "put it first"
                )
            elif branch.cls is not None and not last:
                self.fail(
                    "GP242", f"`@{step.name}` ends in a class, so it comes last in a path", step.span, "put it last"
                )
            elif step.index is not None and (tail is None or tail.index is not None or branch.cls is not None):
                self.fail(
                    "GP242",
                    f"`@{step.name}` cannot take an index",
                    step.index.span or step.span,
                    "an index needs a role that ends in a plain name",
                )
            else:
                continue
            return

    # ── expressions ──

    def from_config(self, expr: s.Expr) -> None:
        """An expression about the whole model: params and `config`, no attributes."""
        self.expression(expr, set(), attributes=False, ops=False)

    def of_target(self, expr: s.Expr, captures: list[set[str]], union: s.SelectorUnion, ops: bool = False) -> None:
        """An expression about each target: its attributes and captures too."""
        self.expression(expr, set().union(*captures), attributes=True, ops=ops)
        for node in walk(expr):
            if isinstance(node, s.Var) and any(node.name in c for c in captures):
                for names, branch in zip(captures, union.branches):
                    if node.name not in names:
                        also = (self.file, branch.span, "and not here")
                        self.check.fail(
                            "GP225",
                            f"`${node.name}` is not captured in every branch",
                            self.file,
                            node.span,
                            "it is used here",
                            also,
                        )

    def args(self, op: s.OpCall, captures: list[set[str]], union: s.SelectorUnion) -> None:
        for arg in op.args:
            self.of_target(arg.value, captures, union, ops=True)
            for node in walk(arg.value):
                if isinstance(node, s.Name) and node.name in self.params:
                    self.fail(
                        "GP207",
                        f"`{node.name}` alone is an attribute of the target, not the param",
                        node.span,
                        f"write ${node.name}",
                    )

    def expression(self, expr: s.Expr, captured: set[str], attributes: bool, ops: bool) -> None:
        for node in walk(expr):
            if isinstance(node, s.Var):
                if node.name not in self.params and node.name not in captured:
                    near = did_you_mean(node.name, {*self.params, *captured})
                    hint = near or "declare it with `param`, or capture an index: layers[i in *]"
                    self.fail("GP226", f"`${node.name}` has no value", node.span, hint)
            elif isinstance(node, s.Name):
                head = node.name.partition(".")[0]
                if not attributes and head != "config":
                    hint = (
                        f"write ${node.name}"
                        if node.name in self.params
                        else "quote it if it is text; a model's settings are config.NAME"
                    )
                    self.fail("GP227", f"`{node.name}` means nothing here", node.span, hint)
            elif isinstance(node, s.Call):
                if node.name not in FUNCTIONS and not ops:
                    near = did_you_mean(node.name, FUNCTIONS) or "there are " + " ".join(sorted(FUNCTIONS))
                    self.fail("GP228", f"there is no function `{node.name}`", node.name_span or node.span, near)
            elif isinstance(node, s.Query):
                self.selector(node.selector)

    def constant(self, expr: s.Expr, param: s.Param) -> None:
        """The type of a value that can be told without a model."""
        if any(
            isinstance(n, (s.Var, s.Name, s.Query)) or (isinstance(n, s.Call) and n.name not in FUNCTIONS)
            for n in walk(expr)
        ):
            return
        try:
            check_type(evaluate(expr, Constants()), param, self.program.source(self.file), expr.span)
        except EvaluationError as error:
            self.fail("GP229", error.message, error.span or expr.span)
        except RuleError as error:
            self.check.findings += error.diagnostics


def _some(names: Any) -> str:
    listed = sorted(names)
    return ", ".join(f"@{n}" for n in listed[:10]) + (" ..." if len(listed) > 10 else "")
