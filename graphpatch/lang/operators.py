"""What comparisons, arithmetic and `[ ]` give: as in Python, but nothing runs long and `none` is never a number."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from . import syntax as s
from .diagnostics import did_you_mean
from .formatter import format_expression
from .no_value import EvaluationError, MissingKey, NoneArithmetic, kind_of, none_used

MOST_BITS = 256
"""Bits of an integer."""
LARGEST = 10_000
"""Characters of a string, items of a list with all the lists in it."""


def holds(op: str, left: Any, right: Any, left_expr: s.Expr, link: s.Comparison) -> bool:
    left, right, right_expr, span = as_list(left), as_list(right), link.right, link.span
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
            raise NoneArithmetic(none_used(right_expr, op), right_expr.span)
        if isinstance(right, str) and not isinstance(left, str):
            if left is None:
                raise NoneArithmetic(none_used(left_expr, op), left_expr.span)
            raise EvaluationError(f"`{op}` a string needs a string on its left, not {kind_of(left)}", span)
        if not isinstance(right, (str, list, Mapping)):
            raise EvaluationError(f"`{op}` needs a list or a string, and this is {kind_of(right)}", right_expr.span)
        if isinstance(right, Mapping):
            return (isinstance(left, str) and left in right) is (op == "in")
        return (left in right) is (op == "in")
    for value, expr in ((left, left_expr), (right, right_expr)):
        if value is None:
            raise NoneArithmetic(none_used(expr, op), expr.span)
    numbers = isinstance(left, (int, float)) and isinstance(right, (int, float))
    if not numbers and not (type(left) is type(right) and isinstance(left, (str, list))):
        raise EvaluationError(f"`{op}` cannot compare {kind_of(left)} with {kind_of(right)}", span)
    try:
        return {"<": left < right, "<=": left <= right, ">": left > right, ">=": left >= right}[op]
    except TypeError:
        raise EvaluationError(f"`{op}` cannot compare these lists: their items are of different kinds", span) from None


def as_list(value: Any) -> Any:
    """Tuples as lists, so that `kernel_size == [3, 3]` compares."""
    if (isinstance(value, tuple) and type(value) is tuple) or isinstance(value, list):
        return [as_list(item) for item in value]
    return value


def arithmetic(expr: s.Binary, left: Any, right: Any) -> Any:
    left, right = as_list(left), as_list(right)
    if expr.op == "+" and type(left) is type(right) and isinstance(left, (str, list)):
        return bounded(left + right)
    if expr.op == "*":
        for sequence, times in ((left, right), (right, left)):
            if isinstance(sequence, (str, list)) and isinstance(times, int):
                if times > LARGEST or _size(sequence) * max(times, 0) > LARGEST:
                    raise EvaluationError(f"this is larger than {LARGEST} items", expr.span)
                return sequence * times
    for value, operand in ((left, expr.left), (right, expr.right)):
        need_numbers(expr.op, operand, value)
    try:
        return bounded_number(_operate(expr.op, left, right))
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


def bounded_number(value: Any) -> Any:
    if isinstance(value, complex):
        raise EvaluationError("a negative number has no such power among the real numbers")
    if isinstance(value, int) and value.bit_length() > MOST_BITS:
        raise OverflowError
    if isinstance(value, float) and not math.isfinite(value):
        raise OverflowError
    return value


def need_numbers(op: str, expr: s.Expr, value: Any) -> None:
    if value is None:
        raise NoneArithmetic(none_used(expr, op), expr.span)
    if not isinstance(value, (int, float)):
        raise EvaluationError(f"`{op}` needs numbers, and this is {kind_of(value)}", expr.span)


def item_of(expr: s.Item, value: Any, index: Any) -> Any:
    if value is None:
        raise NoneArithmetic(none_used(expr.value, "[ ]"), expr.span)
    if isinstance(value, Mapping):
        if not isinstance(index, (str, int)) or index not in value:
            near = did_you_mean(str(index), [k for k in value if isinstance(k, str)])
            raise MissingKey(
                f"`{format_expression(expr.value)}` has no {index!r}{'; ' + near if near else ''}", expr.span
            )
        return value[index]
    if not isinstance(value, (str, Sequence)):
        raise EvaluationError(f"`{format_expression(expr.value)}` is {kind_of(value)} and has no items", expr.span)
    if index is None:
        raise NoneArithmetic(none_used(expr.index, "[ ]"), expr.index.span)
    if isinstance(index, bool) or not isinstance(index, int):
        raise EvaluationError(f"an index is an integer, and this is {kind_of(index)}", expr.index.span)
    if not -len(value) <= index < len(value):
        raise EvaluationError(f"`{format_expression(expr.value)}` has {len(value)} items, so no [{index}]", expr.span)
    return value[index]


def _size(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    return 1 + sum(1 + _size(item) if isinstance(item, (str, list)) else 1 for item in value)


def bounded(value: Any) -> Any:
    if _size(value) > LARGEST:
        raise EvaluationError(f"this is larger than {LARGEST} items")
    return value
