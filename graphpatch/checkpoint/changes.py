"""Do rules still change what they did when an adapter was saved?"""

from __future__ import annotations

from collections.abc import Sequence

from ..lang.diagnostics import Error
from ..plan.select import select
from ..tree.tree import Tree
from .manifest import Change

_SHOWN = 4


def difference(then: Sequence[Change], now: Sequence[Change], tree: Tree) -> tuple[str, ...]:
    """What differs, a line each after a line of counts; nothing where both say the same of `tree`."""
    gone = [change for change in then if not any(_is_still(change, other, tree) for other in now)]
    come = [change for change in now if not any(_is_still(other, change, tree) for other in then)]
    if not gone and not come:
        return ()
    return (
        f"of {len(then)} changes {len(gone)} are gone, and {len(come)} are new",
        *(f"- {_written(change)}" for change in gone[:_SHOWN]),
        *(f"+ {_written(change)}" for change in come[:_SHOWN]),
    )


def _is_still(then: Change, now: Change, tree: Tree) -> bool:
    """Whether a recorded change is this one. Paths may be compressed in another way, by another version."""
    if not then.still(now) or then.paths == now.paths:
        return then.still(now)
    try:
        one, other = (set(select(tree, " | ".join(change.paths))) for change in (then, now))
    except Error:  # they are no selectors
        return False
    return one == other


def _written(change: Change) -> str:
    given = ", ".join(f"{name}={value}" for name, value in change.arguments.items() if value is not None)
    return f"{change.op}({given[:100]}) on {change.count}: {', '.join(change.paths[:3])[:200]}"
