"""Why an expression has no value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import syntax as s
from .diagnostics import Span
from .formatter import format_expression


class EvaluationError(Exception):
    """An expression has no value: `message` is a sentence without a capital, `span` the part to blame."""

    def __init__(self, message: str, span: Span | None = None):
        super().__init__(message)
        self.message, self.span = message, span


class NoneArithmetic(EvaluationError):
    """Ordering, arithmetic or another use of `none` that has no meaning. In a `where` it means: not this module."""


class MissingKey(EvaluationError):
    """A config has no such key. A scope raises it; compared by `==`, `!=` or `is`, the key reads `none`."""


def none_used(expr: s.Expr, op: str) -> str:
    """The sentence of an operator or function that was given `none`."""
    if isinstance(expr, s.Literal_):
        return f"`{op}` cannot be used with none"
    return f"`{format_expression(expr)}` is none, and `{op}` needs a value"


def kind_of(value: Any) -> str:
    """A value's type, in words."""
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
