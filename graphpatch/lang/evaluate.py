"""What an expression is worth: Python's rules for numbers, comparisons and logic, without running any code.

Names get their meaning from a :class:`Scope`. What has no value raises :class:`EvaluationError`, which carries the
span; the caller, who knows the source, makes a diagnostic of it. Results are bounded: no expression takes long.
"""

from __future__ import annotations

from typing import Any, Protocol

from . import syntax as s
from .diagnostics import RuleError, Span
from .functions import FUNCTIONS as FUNCTIONS
from .functions import called
from .functions import unknown_function as unknown_function
from .no_value import EvaluationError as EvaluationError
from .no_value import MissingKey as MissingKey
from .no_value import NoneArithmetic as NoneArithmetic
from .operators import arithmetic, bounded, holds, item_of, need_numbers

DEEPEST = 200
"""Levels of an expression that did not come from the parser."""


class Scope(Protocol):
    """Where names get their meaning. Each method may raise `EvaluationError`."""

    def var(self, name: str, span: Span | None) -> Any:
        """`$name`"""

    def name(self, dotted: str, span: Span | None) -> Any:
        """`in_features`, `config.hidden_size`; an absent attribute is None"""

    def query(self, function: str, selector: s.SelectorUnion, span: Span | None) -> Any:
        """`has(...)`: a bool; `count(...)`: an int"""

    def call(self, name: str, arguments: tuple[s.Arg, ...], span: Span | None) -> Any:
        """A call of what is no function of the language: an op as an argument, its own arguments not yet worked out"""


class Constants:
    """The scope of an expression that stands by itself: no name means anything."""

    def var(self, name: str, span: Span | None) -> Any:
        raise EvaluationError(f"`${name}` has no value here", span)

    def name(self, dotted: str, span: Span | None) -> Any:
        raise EvaluationError(f"`{dotted}` means nothing here: quote it if it is text", span)

    def query(self, function: str, selector: s.SelectorUnion, span: Span | None) -> Any:
        raise EvaluationError(f"`{function}` needs a model", span)

    def call(self, name: str, arguments: tuple[s.Arg, ...], span: Span | None) -> Any:
        raise unknown_function(name, span)


def evaluate(expr: s.Expr, scope: Scope) -> Any:
    """The value: bool, int, float, str, None, a list of these, or what the scope gave. Raises `EvaluationError`."""
    return _Evaluation(scope).value(expr, 0)


def constant(text: str) -> Any:
    """The value of a text that needs no names, `2 * 8`; raises `ValueError` where it has none."""
    from .parser import parse_expression

    try:
        return evaluate(parse_expression(text), Constants())
    except (RuleError, EvaluationError) as error:
        raise ValueError(str(error)) from None


class _Evaluation:
    def __init__(self, scope: Scope):
        self.scope = scope

    def value(self, expr: s.Expr, level: int) -> Any:
        if level > DEEPEST:
            raise EvaluationError(f"this expression has more than {DEEPEST} levels", expr.span)
        try:
            return self._value(expr, level + 1)
        except EvaluationError as error:
            if error.span is None:
                error.span = expr.span
            raise

    def _value(self, expr: s.Expr, level: int) -> Any:
        if isinstance(expr, s.Literal_):
            return expr.value
        if isinstance(expr, s.Var):
            return self.scope.var(expr.name, expr.span)
        if isinstance(expr, s.Name):
            return self.scope.name(expr.name, expr.span)
        if isinstance(expr, s.Query):
            return self.scope.query(expr.function, expr.selector, expr.span)
        if isinstance(expr, s.ListExpr):
            return bounded([self.value(item, level) for item in expr.items])
        if isinstance(expr, s.IfElse):
            return self.value(expr.then if self.value(expr.test, level) else expr.otherwise, level)
        if isinstance(expr, s.BoolOp):
            for operand in expr.operands:
                value = self.value(operand, level)
                if bool(value) is (expr.op == "or"):
                    break
            return value
        if isinstance(expr, s.Compare):
            return self._compare(expr, level)
        if isinstance(expr, s.Unary):
            operand = self.value(expr.operand, level)
            if expr.op == "not":
                return not operand
            need_numbers(expr.op, expr.operand, operand)
            return -operand if expr.op == "-" else +operand
        if isinstance(expr, s.Binary):
            left, right = self.value(expr.left, level), self.value(expr.right, level)
            return arithmetic(expr, left, right)
        if isinstance(expr, s.Item):
            return item_of(expr, self.value(expr.value, level), self.value(expr.index, level))
        function = FUNCTIONS.get(expr.name)
        if function is None:
            return self.scope.call(expr.name, expr.args, expr.span)
        if named := next((arg for arg in expr.args if arg.name is not None), None):
            raise EvaluationError(f"the argument of `{expr.name}` is given without a name", named.span)
        values = [self.value(arg.value, level) for arg in expr.args]
        return called(expr, function, values)

    def _compare(self, expr: s.Compare, level: int) -> bool:
        left_expr, left = expr.left, self._operand(expr.left, level)
        for link in expr.links:
            right = self._operand(link.right, level)
            reads_none = link.op in ("==", "!=", "is", "is not")
            if not holds(link.op, _present(left, reads_none), _present(right, reads_none), left_expr, link):
                return False
            left_expr, left = link.right, right
        return True

    def _operand(self, expr: s.Expr, level: int) -> Any:
        try:
            return self.value(expr, level)
        except MissingKey as error:
            if isinstance(expr, (s.Name, s.Item)):
                return _Absent(error)
            raise


class _Absent:
    """A config key that is not there: none where that makes sense, else the error."""

    def __init__(self, error: MissingKey):
        self.error = error


def _present(value: Any, reads_none: bool) -> Any:
    if not isinstance(value, _Absent):
        return value
    if reads_none:
        return None
    raise value.error
