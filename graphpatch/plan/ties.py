"""One adapter for a tied weight is for all of its uses: a use that is left out would go on without it."""

from __future__ import annotations

from collections.abc import Sequence

from ..lang.diagnostics import Diagnostic
from ..tree.tree import Parameter, Tree
from .plan import Step


def check_ties(tree: Tree, steps: Sequence[Step]) -> list[Diagnostic]:
    """GP457 for each tied weight of which some uses share an op's parameters, and others do not."""
    ops = {(node, step.op.shares): step for step in steps if step.op.shares for node in step.nodes}
    if not ops:
        return []
    groups: dict[Parameter, list[Parameter]] = {}
    for alias, first in tree.ties:
        groups.setdefault(first, [first]).append(alias)
    found = []
    for uses in groups.values():
        nodes = [node for node, name in uses if name == "weight"]
        for names in dict.fromkeys(names for node, names in ops if node in nodes):
            here = [ops[node, names] for node in nodes if (node, names) in ops]
            left = [tree.paths[node] for node in nodes if (node, names) not in ops]
            differ = {step.op.text() for step in here}
            if left or len(differ) > 1:
                found.append(_one_sided(here[0], left, sorted(differ), [tree.paths[node] for node in nodes]))
    return found


def _one_sided(step: Step, left: Sequence[str], differ: Sequence[str], paths: Sequence[str]) -> Diagnostic:
    why = f"`{left[0]}` has the weight too, and is no target" if left else f"they differ: {' and '.join(differ)}"
    return Diagnostic(
        "GP457",
        f"{step.op.text()} is not the same for all uses of a tied weight",
        text=(f"{step.rule}: {why}",),
        fixes=(f"patch {' | '.join(f'^{path}' for path in paths)} with {step.op.text()}",),
    )
