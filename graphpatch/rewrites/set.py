"""`set` on any module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import nn

from ..ops.op import Op
from ..ops.set import Set
from .rewrite import Attributes


class SetAttributes(Attributes):
    """The values of the rule, a list as a tuple where the module holds a tuple, an int as a float where a float."""

    @staticmethod
    def values(op: Op, module: nn.Module) -> Mapping[str, Any]:
        return {name: _like(module.__dict__.get(name), value) for name, value in cast(Set, op).values.items()}


def _like(old: Any, value: Any) -> Any:
    if isinstance(old, (tuple, list)) and isinstance(value, (tuple, list)):
        return type(old)(value)
    if isinstance(old, float) and isinstance(value, int):
        return float(value)
    return value
