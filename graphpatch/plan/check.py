"""What can be said of a rule file without a model: its ops exist, their arguments have the right names and types."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..lang.diagnostics import Diagnostic, Error
from ..lang.evaluate import EvaluationError, evaluate
from ..lang.syntax import OpCall, Patch, Statement, When
from ..ops.arguments import arguments
from ..ops.registry import find
from ..tree.tree import Signature, Tree
from .opcall import SLOTS, checked_build, inserted
from .ruleset import RuleSet
from .scope import FileScope, World


def check(rules: RuleSet) -> list[Diagnostic]:
    """Everything wrong with the ops of a rule set. Arguments that need a model are checked when one is there."""
    world = World(rules.program, _nothing())
    findings: list[Diagnostic] = []
    for file, statement in rules.program.statements():
        for patch in _patches(statement):
            for call in patch.ops:
                try:
                    _check_call(call, _WithoutModel(world, file))
                except Error as error:
                    findings += error.diagnostics
    return findings


def _patches(statement: Statement) -> Iterator[Patch]:
    if isinstance(statement, Patch):
        yield statement
    elif isinstance(statement, When):
        for inner in statement.body:
            yield from _patches(inner)


def _nothing() -> Tree:
    """The tree of no model: only params with constant values have a meaning against it."""
    return Tree([""], [-1], [-1], [0], [1], [0], [Signature(())])


class _Unknown(Exception):
    """A value that only a model can give."""


class _WithoutModel(FileScope):
    def name(self, dotted: str, span: Any) -> Any:
        raise _Unknown

    def query(self, function: str, selector: Any, span: Any) -> Any:
        raise _Unknown

    def var(self, name: str, span: Any) -> Any:
        try:
            return super().var(name, span)
        except Error:
            raise _Unknown from None

    def at(self, file: int) -> FileScope:
        return self if file == self.file else _WithoutModel(self.world, file)


def _check_call(call: OpCall, scope: FileScope) -> None:
    if call.name in SLOTS:
        call = inserted(call, scope)
    positional: list[Any] = []
    named: dict[str, Any] = {}
    unknown: set[str | int] = set()
    for at, arg in enumerate(call.args):
        try:
            value = evaluate(arg.value, scope)
        except _Unknown:
            unknown.add(arg.name or at)
            continue
        except EvaluationError as error:
            scope.fail("GP220", str(error), error.span or arg.value.span)
        if arg.name is None:
            positional.append(value)
        else:
            named[arg.name] = value
    if not unknown:
        checked_build(call, scope, positional, named)
        return
    # Some values are not known yet: the names can be judged all the same.
    cls = find(call.name)
    names = [arg.name for arg in call.args if arg.name]
    if cls is None or (cls.model_config.get("extra") != "allow" and not set(names) <= set(arguments(cls))):
        checked_build(call, scope, [], {name: named.get(name) for name in names})
