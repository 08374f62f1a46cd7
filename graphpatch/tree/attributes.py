"""Which instance attributes are facts about a module: scalars, and tuples of them."""

from __future__ import annotations

from enum import Enum
from typing import Any

SCALARS = {bool, int, float, str, type(None)}
_LONGEST = 4096
"""Tuples and strings longer than this, and integers of more bits, are data, not facts about a module: left out."""
_DEEPEST = 8
"""A list may hold itself."""
ABSENT = object()


def may_be_fact(value: Any) -> bool:
    """Whether values of this type may be facts."""
    return isinstance(value, (bool, int, float, str, tuple, list, Enum)) or _is_dtype(value)


def as_fact(value: Any, depth: int = 0) -> Any:
    """A value as a scalar or a tuple of scalars; `ABSENT` where it is none."""
    kind = type(value)
    if (kind is str and len(value) > _LONGEST) or (kind is int and value.bit_length() > _LONGEST):
        return ABSENT
    if kind in SCALARS:
        return value
    if _is_dtype(value):
        return str(value).removeprefix("torch.")
    if isinstance(value, Enum):
        return as_fact(value.value) if type(value.value) in SCALARS else value.name
    for plain in (bool, int, float, str):
        if isinstance(value, plain):
            return plain(value)
    if isinstance(value, (tuple, list)) and len(value) <= _LONGEST and depth < _DEEPEST:
        items = tuple([as_fact(item, depth + 1) for item in value])
        return ABSENT if any(item is ABSENT for item in items) else items
    return ABSENT


def _is_dtype(value: Any) -> bool:
    """A torch.dtype, told by its name: this room does without torch."""
    return type(value).__name__ == "dtype" and type(value).__module__ == "torch"
