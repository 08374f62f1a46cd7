"""What an expression is worth: Python's rules for numbers, comparisons and logic, without running any code.

Names get their meaning from a :class:`Scope`. What has no value raises :class:`EvaluationError`, which carries the
span; the caller, who knows the source, makes a diagnostic of it. Results are bounded: no expression takes long.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from . import syntax as s
from .diagnostics import RuleError, Span, did_you_mean
from .formatter import format_expression

MOST_BITS = 256
"""Bits of an integer."""
LARGEST = 10_000
"""Characters of a string, items of a list with all the lists in it."""
DEEPEST = 200
"""Levels of an expression that did not come from the parser."""


class EvaluationError(Exception):
    """An expression has no value: `message` is a sentence without a capital, `span` the part to blame."""

    def __init__(self, message: str, span: Span | None = None):
        super().__init__(message)
        self.message, self.span = message, span


class NoneArithmetic(EvaluationError):
    """Ordering, arithmetic or another use of `none` that has no meaning. In a `where` it means: not this module."""


class MissingKey(EvaluationError):
    """A config has no such key. A scope raises it; compared by `==`, `!=` or `is`, the key reads `none`."""


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


def unknown_function(name: str, span: Span | None) -> EvaluationError:
    """The error of a call of what is neither a function of the language nor an op."""
    near = did_you_mean(name, FUNCTIONS)
    return EvaluationError(f"there is no function `{name}`; {near or 'there are ' + ' '.join(sorted(FUNCTIONS))}", span)


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
            return _bounded([self.value(item, level) for item in expr.items])
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
            _numbers(expr.op, expr.operand, operand)
            return -operand if expr.op == "-" else +operand
        if isinstance(expr, s.Binary):
            left, right = self.value(expr.left, level), self.value(expr.right, level)
            return _arithmetic(expr, left, right)
        if isinstance(expr, s.Item):
            return _item(expr, self.value(expr.value, level), self.value(expr.index, level))
        function = FUNCTIONS.get(expr.name)
        if function is None:
            return self.scope.call(expr.name, expr.args, expr.span)
        if named := next((arg for arg in expr.args if arg.name is not None), None):
            raise EvaluationError(f"the argument of `{expr.name}` is given without a name", named.span)
        values = [self.value(arg.value, level) for arg in expr.args]
        return _called(expr, function, values)

    def _compare(self, expr: s.Compare, level: int) -> bool:
        left_expr, left = expr.left, self._operand(expr.left, level)
        for link in expr.links:
            right = self._operand(link.right, level)
            reads_none = link.op in ("==", "!=", "is", "is not")
            if not _holds(link.op, _present(left, reads_none), _present(right, reads_none), left_expr, link):
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


# ── comparisons ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _holds(op: str, left: Any, right: Any, left_expr: s.Expr, link: s.Comparison) -> bool:
    left, right, right_expr, span = _listed(left), _listed(right), link.right, link.span
    if op == "==":
        return bool(left == right)
    if op == "!=":
        return bool(left != right)
    if op in ("is", "is not"):
        if not any(isinstance(x, (bool, type(None))) for x in (left, right)):
            raise EvaluationError("`is` tells `none`, `true` and `false`; values are compared with `==`", span)
        return (left is right) is (op == "is")
    if op in ("in", "not in"):
        if right is None:
            raise NoneArithmetic(_none(right_expr, op), right_expr.span)
        if isinstance(right, str) and not isinstance(left, str):
            if left is None:
                raise NoneArithmetic(_none(left_expr, op), left_expr.span)
            raise EvaluationError(f"`{op}` a string needs a string on its left, not {_kind(left)}", span)
        if not isinstance(right, (str, list, Mapping)):
            raise EvaluationError(f"`{op}` needs a list or a string, and this is {_kind(right)}", right_expr.span)
        if isinstance(right, Mapping):
            return (isinstance(left, str) and left in right) is (op == "in")
        return (left in right) is (op == "in")
    for value, expr in ((left, left_expr), (right, right_expr)):
        if value is None:
            raise NoneArithmetic(_none(expr, op), expr.span)
    numbers = isinstance(left, (int, float)) and isinstance(right, (int, float))
    if not numbers and not (type(left) is type(right) and isinstance(left, (str, list))):
        raise EvaluationError(f"`{op}` cannot compare {_kind(left)} with {_kind(right)}", span)
    try:
        return {"<": left < right, "<=": left <= right, ">": left > right, ">=": left >= right}[op]
    except TypeError:
        raise EvaluationError(f"`{op}` cannot compare these lists: their items are of different kinds", span) from None


def _listed(value: Any) -> Any:
    """Tuples as lists, so that `kernel_size == [3, 3]` compares."""
    if (isinstance(value, tuple) and type(value) is tuple) or isinstance(value, list):
        return [_listed(item) for item in value]
    return value


# ── arithmetic ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _arithmetic(expr: s.Binary, left: Any, right: Any) -> Any:
    left, right = _listed(left), _listed(right)
    if expr.op == "+" and type(left) is type(right) and isinstance(left, (str, list)):
        return _bounded(left + right)
    if expr.op == "*":
        for sequence, times in ((left, right), (right, left)):
            if isinstance(sequence, (str, list)) and isinstance(times, int):
                if times > LARGEST or _size(sequence) * max(times, 0) > LARGEST:
                    raise EvaluationError(f"this is larger than {LARGEST} items", expr.span)
                return sequence * times
    for value, operand in ((left, expr.left), (right, expr.right)):
        _numbers(expr.op, operand, value)
    try:
        return _number(_operate(expr.op, left, right))
    except ZeroDivisionError:
        if expr.op == "**":
            raise EvaluationError("0 has no negative power", expr.span) from None
        raise EvaluationError(
            f"division by zero: `{format_expression(expr.right)}` is 0", expr.right.span or expr.span
        ) from None
    except OverflowError:
        raise EvaluationError("the result is too large", expr.span) from None


def _operate(op: str, left: Any, right: Any) -> Any:
    if op == "+":
        return left + right
    if op == "-":
        return left - right
    if op == "*":
        return left * right
    if op == "/":
        return left / right
    if op == "//":
        return left // right
    if op == "%":
        return left % right
    if isinstance(left, int) and isinstance(right, int) and right > 0 and abs(left) > 1:
        if left.bit_length() * right > 2 * MOST_BITS:
            raise OverflowError
    return left**right


def _number(value: Any) -> Any:
    if isinstance(value, complex):
        raise EvaluationError("a negative number has no such power among the real numbers")
    if isinstance(value, int) and value.bit_length() > MOST_BITS:
        raise OverflowError
    if isinstance(value, float) and not math.isfinite(value):
        raise OverflowError
    return value


def _numbers(op: str, expr: s.Expr, value: Any) -> None:
    if value is None:
        raise NoneArithmetic(_none(expr, op), expr.span)
    if not isinstance(value, (int, float)):
        raise EvaluationError(f"`{op}` needs numbers, and this is {_kind(value)}", expr.span)


def _item(expr: s.Item, value: Any, index: Any) -> Any:
    if value is None:
        raise NoneArithmetic(_none(expr.value, "[ ]"), expr.span)
    if isinstance(value, Mapping):
        if not isinstance(index, (str, int)) or index not in value:
            near = did_you_mean(str(index), [k for k in value if isinstance(k, str)])
            raise MissingKey(
                f"`{format_expression(expr.value)}` has no {index!r}{'; ' + near if near else ''}", expr.span
            )
        return value[index]
    if not isinstance(value, (str, Sequence)):
        raise EvaluationError(f"`{format_expression(expr.value)}` is {_kind(value)} and has no items", expr.span)
    if index is None:
        raise NoneArithmetic(_none(expr.index, "[ ]"), expr.index.span)
    if isinstance(index, bool) or not isinstance(index, int):
        raise EvaluationError(f"an index is an integer, and this is {_kind(index)}", expr.index.span)
    if not -len(value) <= index < len(value):
        raise EvaluationError(f"`{format_expression(expr.value)}` has {len(value)} items, so no [{index}]", expr.span)
    return value[index]


# ── functions ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _called(expr: s.Call, function: Callable[..., Any], values: list[Any]) -> Any:
    for value, arg in zip(values, expr.args):
        if value is None:
            raise NoneArithmetic(_none(arg.value, expr.name), arg.span)
    try:
        return _number(function(*values))
    except EvaluationError as error:
        error.span = error.span or expr.span
        raise
    except OverflowError:
        raise EvaluationError("the result is too large", expr.span) from None
    except (TypeError, ValueError):
        given = ", ".join(map(_kind, values)) or "nothing"
        raise EvaluationError(f"`{expr.name}` cannot take {given}", expr.span) from None


def _real(value: Any) -> Any:
    if not isinstance(value, (int, float)):
        raise TypeError
    return value


def _positive(function: Callable[[Any], float], what: str, zero: bool) -> Callable[[Any], float]:
    def checked(value: Any) -> float:
        if _real(value) < 0 or (value == 0 and not zero):
            raise EvaluationError(f"{value} has no {what}")
        return function(value)

    return checked


def _extreme(function: Callable[[Any], Any]) -> Callable[..., Any]:
    def checked(*values: Any) -> Any:
        items = _listed(values[0]) if len(values) == 1 else list(values)
        if not isinstance(items, list) or not items:
            raise TypeError
        if None in items:
            raise NoneArithmetic("one of the values is none")
        return function(items)

    return checked


def _round(value: Any, digits: Any = None) -> Any:
    if digits is not None and (isinstance(digits, bool) or not isinstance(digits, int) or abs(digits) > 400):
        raise TypeError
    return round(_real(value), digits)


def _len(value: Any) -> int:
    if not isinstance(value, (str, list, tuple, Mapping)):
        raise TypeError
    return len(value)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "sqrt": _positive(math.sqrt, "square root", zero=True),
    "log2": _positive(math.log2, "logarithm", zero=False),
    "min": _extreme(min),
    "max": _extreme(max),
    "abs": lambda value: abs(_real(value)),
    "round": _round,
    "int": lambda value: int(_real(value)),
    "float": lambda value: float(_real(value)),
    "len": _len,
}
"""The functions of the language: of numbers, but for `len`, and for `min` and `max` of strings."""


# ── words ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _none(expr: s.Expr, op: str) -> str:
    if isinstance(expr, s.Literal_):
        return f"`{op}` cannot be used with none"
    return f"`{format_expression(expr)}` is none, and `{op}` needs a value"


def _kind(value: Any) -> str:
    if value is None:
        return "none"
    for kind, word in (
        (bool, "a bool"),
        (int, "an integer"),
        (float, "a float"),
        (str, "a string"),
        (Mapping, "a table"),
    ):
        if isinstance(value, kind):
            return word
    return "a list" if isinstance(value, (list, tuple)) and type(value) in (list, tuple) else "something else"


def _size(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    return 1 + sum(1 + _size(item) if isinstance(item, (str, list)) else 1 for item in value)


def _bounded(value: Any) -> Any:
    if _size(value) > LARGEST:
        raise EvaluationError(f"this is larger than {LARGEST} items")
    return value
