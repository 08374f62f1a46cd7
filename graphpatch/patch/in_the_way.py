"""What stands in the way of a step: another op where it wants to be, or one that keeps its target from being called."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..lang.diagnostics import ApplyError, Diagnostic
from ..rewrites.rewrite import overrides
from ..tree.tree import Tree
from .change import Change
from .in_place import InPlaceChange
from .record import RECORD, record_of

if TYPE_CHECKING:
    from ..plan.plan import Step


def refuse_taken(tree: Tree, steps: Sequence[Step], bare: bool) -> None:
    """Raise where a target carries, or will, an op that takes the same slot, or that suffers no other (GP504). `bare`:
    no module carries any."""
    assert tree.modules is not None
    claimed: dict[int, list[Step]] = defaultdict(list)
    several = len(set().union(*(step.nodes for step in steps))) < sum(len(step.nodes) for step in steps)
    for step in steps:
        slots = step.slots
        for at, node in enumerate(step.nodes) if several else ():
            for other in claimed[node]:
                shared = other.slots & slots or other.adds.keys() & step.adds.keys()
                if shared or other.op.exclusive or step.op.exclusive:
                    raise _collides(tree, step, at, other.op.text(), other.rule)
            claimed[node].append(step)
        patched = (
            [at for at, node in enumerate(step.nodes) if RECORD in tree.modules[node].__dict__] if not bare else ()
        )
        for at in patched:
            for mark in record_of(tree.modules[step.nodes[at]]).marks:
                if mark.exclusive or step.op.exclusive or mark.slots & slots:
                    raise _collides(tree, step, at, mark.op, mark.rule)


Idle = Mapping[int, str]
"""The modules that are not called, by their ids, and what stands in their place."""


def uncalled_already(tree: Tree) -> Idle:
    """Those that an earlier patch keeps from being called."""
    assert tree.modules is not None
    idle: dict[int, str] = {}
    stilling: dict[int, list[Any]] = {}  # by record, which modules that were patched alike share
    for node in tree.marks:
        record = record_of(tree.modules[node])
        if id(record) not in stilling:
            stilling[id(record)] = [held for held in record.held if overrides(held.mixin, "uncalled")]
        for held in stilling[id(record)]:
            for part in held.mixin.uncalled(held.entry, tree.modules[node]):
                idle |= dict.fromkeys(map(id, part.modules()), held.entry.text)
    return idle


def uncalled_by(changes: Iterable[Change]) -> Idle:
    """Those that nobody calls once these changes are made."""
    idle: dict[int, str] = {}
    for change in changes:
        if isinstance(change, InPlaceChange) and overrides(change.mixin, "uncalled"):
            for module in change.modules:
                for part in change.mixin.uncalled(change.entry, module):
                    idle |= dict.fromkeys(map(id, part.modules()), change.entry.text)
    return idle


def refuse_uncalled(tree: Tree, steps: Sequence[Step], idle: Idle) -> None:
    """Raise where a target would not be called (GP522)."""
    assert tree.modules is not None
    for step in steps if idle else ():
        for node in step.nodes:
            other = idle.get(id(tree.modules[node]))
            if other is not None:
                path = tree.paths[node] or "^"
                why = f"{other} stands in its place, so `{step.op.op}` there would do nothing"
                raise step_error(
                    "GP522", f"`{path}` is not called any more", step, why, f"leave it out: except ^{path}"
                )


def _collides(tree: Tree, step: Step, at: int, other: str, rule: str) -> ApplyError:
    return step_error(
        "GP504",
        f"`{tree.paths[step.nodes[at]] or '^'}` has {other} already",
        step,
        f"put there by {rule}",
        "revert that patch first, or give this one another adapter name",
    )


def step_error(code: str, title: str, step: Step, why: str = "", fix: str = "") -> ApplyError:
    text = (f"{step.rule}   {step.op.text()}", *([why] if why else []))
    return ApplyError(Diagnostic(code, title, text=text, fixes=(fix,) if fix else ()))
