"""From `lora(rank=$rank)` in a rule to the op `Lora(rank=16)`: what is wrong with it is said at its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..lang.diagnostics import Span
from ..lang.syntax import Call, OpCall
from ..ops.arguments import ArgumentError, UnknownOp, build
from ..ops.op import Op
from ..ops.registry import find
from .scope import FileScope


def build_op(call: OpCall, scope: FileScope) -> Op:
    """The op of a rule, its arguments worked out.

    Raises `PlanError` with its place: GP201 unknown op, GP203 unknown argument, GP204 bad value.
    """
    if call.name in SLOTS:
        made = build_op(inserted(call, scope), scope)
        # What follows the output of a module is what acts on its output.
        return made if call.name == "insert_after" else checked_build(call, scope, [SLOTS[call.name], made], {})
    positional = [scope.value(arg.value) for arg in call.args if arg.name is None]
    named = {arg.name: scope.value(arg.value) for arg in call.args if arg.name is not None}
    return checked_build(call, scope, positional, named)


SLOTS = {"insert_before": "input", "insert_after": "output"}
"""Where a module has room for another op."""


def inserted(call: OpCall, scope: FileScope) -> OpCall:
    """The op in `insert_after("output", adapter.bottleneck(dim=64))`.

    Raises `PlanError`: GP204 for another slot, or what does not act on outputs.
    """
    slot, values = SLOTS[call.name], [arg.value for arg in call.args]
    if len(values) != 2 or not isinstance(values[1], Call):
        say = f'write {call.name}("{slot}", adapter.bottleneck(dim=64)): a slot, and an op'
        scope.fail("GP204", f'`{call.name}` takes the slot "{slot}" and an op', call.span, say)
    inner = values[1]
    if (given := scope.value(values[0])) != slot:
        other = next((name for name, its in SLOTS.items() if its == given), None)
        label = f'write {other}("{given}", ...)' if other else f'"{slot}"'
        side = call.name.removeprefix("insert_")
        scope.fail("GP204", f"an op can stand {side} a module's {slot}, no other slot", values[0].span, label)
    cls = find(inner.name)
    if cls is not None and not cls.acts_on_output:
        label = "nothing is inserted into it" if inner.name in SLOTS else f"write it alone: with {inner.name}"
        scope.fail("GP204", f"`{inner.name}` does not act on outputs", inner.span, label)
    return OpCall(name=inner.name, args=inner.args, span=inner.span, name_span=inner.span)


def checked_build(call: OpCall, scope: FileScope, positional: Sequence[Any], named: Mapping[str, Any]) -> Op:
    try:
        return build(call.name, positional, named)
    except UnknownOp as unknown:
        hint = f"did you mean `{unknown.suggestions[0]}`? " if unknown.suggestions else ""
        scope.fail("GP201", str(unknown), call.name_span or call.span, f"{hint}`graphpatch ops` lists all of them")
    except ArgumentError as wrong:
        near = f"did you mean {' or '.join(f'`{s}`' for s in wrong.suggestions)}?" if wrong.suggestions else ""
        label = ". ".join(part for part in (near.removesuffix("?") + "?" if near else "", wrong.hint) if part)
        span = _argument_span(call, wrong)
        scope.fail("GP203" if wrong.unknown else "GP204", wrong.message, span, label.replace("?.", "?"))


def _argument_span(call: OpCall, wrong: ArgumentError) -> Span | None:
    for at, arg in enumerate(call.args):
        if wrong.argument is not None and wrong.argument in (arg.name, at if arg.name is None else None):
            return arg.name_span if wrong.unknown else arg.value.span
    return call.span
