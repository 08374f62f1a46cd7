"""Set plain attributes of a module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import ConfigDict, model_validator

from ..lang.diagnostics import did_you_mean
from ..tree.tree import Signature
from .op import Op, Refusal, Target
from .registry import register


@register("set")
class Set(Op):
    """Set attributes that the module already has: set(eps=1e-6, p=0.1).

    The type must agree: an int may become a float, a bool is no int, a list fits a tuple; `none` fits any, and any fits
    where `none` stood. Only what `graphpatch tree` shows of a module can be set. An attribute that the module read
    when it was built, and not since (`in_features`), changes nothing by being set; which those are, no tree can tell.
    """

    model_config = ConfigDict(extra="allow")

    accepts: ClassVar = {"*": "graphpatch.rewrites.set:SetAttributes"}

    @model_validator(mode="after")
    def _sets_something(self) -> Set:
        if not self.values:
            raise ValueError("says which attribute to set: set(eps=1e-6)")
        return self

    @property
    def values(self) -> Mapping[str, Any]:
        return self.model_extra or {}

    def slots(self) -> frozenset[str]:
        return frozenset(f"set.{name}" for name in self.values)

    def check(self, target: Target) -> None:
        for name, value in self.values.items():
            _check_attribute(target.signature, name, value)


def _check_attribute(signature: Signature, name: str, value: Any) -> None:
    if name not in signature.attributes:
        kind = "parameter" if name in signature.parameters else "buffer" if name in signature.buffers else ""
        known = sorted(signature.attributes)
        raise Refusal(
            f"`{name}` of {signature.cls} is a {kind}, and `set` sets plain attributes"
            if kind
            else f"{signature.cls} has no attribute `{name}`",
            did_you_mean(name, known) or f"it has {', '.join(known) or 'none that can be set'}",
        )
    old = signature.attributes[name]
    if old is None or value is None or _agrees(old, value):
        return
    raise Refusal(f"`{name}` of {signature.cls} is {_kind(old)} ({old!r}), and {value!r} is {_kind(value)}")


def _agrees(old: Any, new: Any) -> bool:
    if isinstance(old, (list, tuple)):
        return isinstance(new, (list, tuple))
    if isinstance(old, float):
        return isinstance(new, (int, float)) and not isinstance(new, bool)
    return type(old) is type(new)


def _kind(value: Any) -> str:
    kinds = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        list: "a list",
        tuple: "a list",
    }
    return kinds.get(type(value), type(value).__name__)
