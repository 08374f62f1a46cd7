"""The functions that an expression may call."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from . import syntax as s
from .diagnostics import Span, did_you_mean
from .no_value import EvaluationError, NoneArithmetic, kind_of, none_used
from .operators import as_list, bounded_number


def called(expr: s.Call, function: Callable[..., Any], values: list[Any]) -> Any:
    for value, arg in zip(values, expr.args):
        if value is None:
            raise NoneArithmetic(none_used(arg.value, expr.name), arg.span)
    try:
        return bounded_number(function(*values))
    except EvaluationError as error:
        error.span = error.span or expr.span
        raise
    except OverflowError:
        raise EvaluationError("the result is too large", expr.span) from None
    except (TypeError, ValueError):
        given = ", ".join(map(kind_of, values)) or "nothing"
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
        items = as_list(values[0]) if len(values) == 1 else list(values)
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


def unknown_function(name: str, span: Span | None) -> EvaluationError:
    """The error of a call of what is neither a function of the language nor an op."""
    near = did_you_mean(name, FUNCTIONS)
    return EvaluationError(f"there is no function `{name}`; {near or 'there are ' + ' '.join(sorted(FUNCTIONS))}", span)
