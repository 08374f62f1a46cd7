"""The values of params: what they may be, and whether one is of the type that was declared."""

from __future__ import annotations

import math
from typing import Any

from .diagnostics import Diagnostic, Place, RuleError, Source, Span
from .parser import parse_value
from .syntax import Literal_, Param

DEEPEST = 20
LARGEST = 10_000
"""Items of a list with all the lists in it."""


class Setting(str):
    """A value as a command line gives it, `--set rank=32`: text that is read by the type of its param."""


def optional(param: Param) -> bool:
    """Whether `none` is a value of it: `param window: int = none`."""
    return isinstance(param.default, Literal_) and param.default.value is None


def check_type(value: Any, param: Param, source: Source | None = None, span: Span | None = None) -> Any:
    """The value as the param takes it: int widens to float, a tuple becomes a list, a `Setting` is read.

    Raises `RuleError` (GP205) where it does not fit; `source` and `span` say where it was written.
    """
    title = f"`{param.name}` takes {_a(param.type)}" if param.type else f"`{param.name}` cannot take this value"
    if isinstance(value, Setting):
        try:
            value = None if value.strip() == "none" and optional(param) else parse_value(str(value), param.type)
        except RuleError:
            said = f"`{value}` is not" if value.strip() else "nothing is given behind the `=`"
            raise _refusal(title, said, source, span) from None
    if value is None and (optional(param) or param.type is None):
        return None
    value = _plain(value, title, source, span)
    kind = type(value).__name__
    if param.type is None or kind == param.type:
        return value
    if param.type == "float" and kind == "int":
        return float(value)
    hint = "to allow none, write = none as its default" if value is None else ""
    raise _refusal(title, f"this is {_show(value)}", source, span, hint)


def _plain(value: Any, title: str, source: Source | None, span: Span | None, level: int = 0) -> Any:
    if isinstance(value, (list, tuple)):
        if level > DEEPEST or len(value) > LARGEST:
            raise _refusal(title, "this list is too large", source, span)
        return [_plain(item, title, source, span, level + 1) for item in value]
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value):
        return str(value)
    if isinstance(value, int) and abs(value) < 2**63:
        return int(value)
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    raise _refusal(
        title, f"this is {_show(value)}", source, span, "values are int, float, bool, str, and lists of these"
    )


def _a(type_: str) -> str:
    return "an int" if type_ == "int" else f"a {type_}"


def _show(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return f"the bool {str(value).lower()}"
    try:
        text = repr(value)
    except Exception:  # a repr is code of the caller's
        text = "..."
    text = text if len(text) <= 60 else text[:57] + "..."
    return f"{_a(type(value).__name__)}, {text}" if type(value).__name__ in ("int", "float", "str", "list") else text


def _refusal(title: str, what: str, source: Source | None, span: Span | None, *fixes: str) -> RuleError:
    kept = tuple(f for f in fixes if f)
    if source is not None and span is not None:
        return RuleError(Diagnostic("GP205", title, (Place(source, span, what),), fixes=kept))
    return RuleError(Diagnostic("GP205", title, text=(what,), fixes=kept))
