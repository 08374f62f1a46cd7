"""A plan as text: concise first, every compressed path pastes back as a selector."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..tree.compress import compress
from ..tree.tree import Parameter, Tree
from .plan import Outcome, Plan
from .scope import show

_NARROW, _RIGHT = 58, 42
"""The first column is as wide as its longest line, but not below the one, and leaves the numbers the other."""
_BOLD, _GREEN, _YELLOW, _BLUE, _RESET = "\x1b[1m", "\x1b[32m", "\x1b[33m", "\x1b[34m", "\x1b[0m"
_PAINT = {"+": _GREEN, "~": _YELLOW, "-/+": _YELLOW, "=": _BLUE}


class _Row(NamedTuple):
    left: str
    right: str
    paint: str


def plan_text(plan: Plan, color: bool = False, verbose: bool = False, width: int = 140) -> str:
    """The plan for a terminal or a log, `width` columns wide; `verbose` lists every path instead of compressed ones."""
    paint = _painter(color)
    numbered = _by_rule(plan)
    blocks = [
        [_outcome_row(outcome)]
        + [row for change in numbered.get(outcome.rule, ()) for row in _change_rows(plan.tree, change, verbose)]
        for outcome in plan.outcomes
    ]
    longest = max((len(row.left) for block in blocks for row in block), default=0)
    column = min(max(_NARROW, longest + 1), max(_RIGHT, width - _RIGHT))
    lines = [_heading(plan, paint)]
    for block in blocks:
        lines.append("")
        for left, right, code in block:
            lines.append(f"{paint(left, code)}{' ' * max(1, column - len(left))} {right}".rstrip())
    for name, paths in plan.groups.items():
        lines += ["", f"optimizer group {name}: {', '.join(paths)}"]
    lines += ["", *_summary(plan, paint)]
    for warning in plan.warnings:
        lines += ["", warning.render(color)]
    return "\n".join(lines)


def _painter(color: bool) -> Any:
    return (lambda text, code: f"{code}{text}{_RESET}") if color else (lambda text, code: text)


def _heading(plan: Plan, paint: Any) -> str:
    tree = plan.tree
    where = f"{tree.source}, " if tree.source else ""
    title = f"{plan.rules.name} against {tree.title or 'a tree without classes'} "
    title += f"({where}{_many(len(tree), 'module')}, {amount(tree.numel())} parameters)"
    params = "   ".join(f"{name} = {show(value)}" for name, value in plan.params.items())
    head = paint(title, _BOLD)
    return f"{head}{' ' * max(2, 84 - len(title))}{params}" if params else head


@dataclass
class _Change:
    """What one rule does alike, whatever the shapes."""

    symbol: str
    what: str
    nodes: list[int] = field(default_factory=list)
    parameters: list[Parameter] = field(default_factory=list)
    gain: int = 0
    loss: int = 0


def _by_rule(plan: Plan) -> Mapping[str, Sequence[_Change]]:
    found: dict[str, dict[tuple[str, str, str], _Change]] = {}
    for steps, standing in ((plan.steps, None), (plan.already, "=")):
        for step in steps:
            symbol = standing or step.op.symbol
            what = step.before if step.before == step.after else f"{step.before} -> {step.after}"
            key = (symbol, step.op.text(), what)
            change = found.setdefault(step.rule, {}).setdefault(key, _Change(symbol, what))
            if step.parameter:
                change.parameters += [(node, step.parameter) for node in step.nodes]
            else:
                change.nodes += step.nodes
            change.gain += len(step.nodes) * sum(t.numel for t in step.adds.values())
            change.loss += sum(plan.tree.signature(n).parameters[name].numel for name in step.drops for n in step.nodes)
    return {rule: list(changes.values()) for rule, changes in found.items()}


def _outcome_row(outcome: Outcome) -> _Row:
    if outcome.frozen is not None:
        count = f"{amount(outcome.parameters)} parameters"
    else:
        count = _many(outcome.matched, "module")
    return _Row(f"{outcome.rule:<14} {outcome.text}", f"{count:<13}{outcome.coverage}", _BOLD)


def _change_rows(tree: Tree, change: _Change, verbose: bool) -> Iterable[_Row]:
    nodes, parameters = sorted(change.nodes), sorted(change.parameters)
    if verbose:
        paths = [f"^{tree.paths[node]}" for node in nodes]
        paths += [f"^{tree.parameter_paths(parameter)[0]}" for parameter in parameters]
    else:
        paths = compress(tree, nodes, parameters)
    for at, path in enumerate(paths):
        gain = f"+{amount(change.gain)}" if change.gain else f"-{amount(change.loss)}" if change.loss else ""
        right = f"{change.what:<26} {gain}" if at == 0 else ""
        yield _Row(f"  {change.symbol} {path}", right, _PAINT[change.symbol])


def _summary(plan: Plan, paint: Any) -> Iterable[str]:
    totals = plan.totals
    standing = f", {sum(len(s.nodes) for s in plan.already)} already applied" if plan.already else ""
    dropped = f"{totals.keys_dropped} dropped, " if totals.keys_dropped else ""
    yield paint(
        f"Plan: {totals.rewritten} to rewrite, {totals.replaced} to replace, {totals.added_modules} to add{standing}. "
        f"Trainable {amount(totals.trainable)} of {amount(totals.parameters_after)} ({_percent(totals.share)}). "
        f"Checkpoint: {totals.keys_added} keys added, {dropped}{totals.keys_moved} moved.",
        _BOLD,
    )
    memory = f"Memory: +{_bytes(totals.bytes_added)} of parameters." if totals.bytes_added else ""
    if totals.bytes_dense:
        saved = totals.bytes_dense - totals.bytes_quantised - totals.bytes_kept
        change = f"-{_bytes(saved)}" if saved >= 0 else f"+{_bytes(-saved)}, the originals being kept"
        weights = f"Weights of {_bytes(totals.bytes_dense)} in {_bytes(totals.bytes_quantised)}: {change}."
        memory = f"{memory or 'Memory:'} {weights}"
    if memory:
        yield memory


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def amount(elements: int) -> str:
    """`8.03 B`, `10.2 M`, `640`."""
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if elements >= size:
            scaled = elements / size
            return f"{scaled:.2f} {unit}" if scaled < 10 else f"{scaled:.1f} {unit}"
    return str(elements)


def _percent(share: float) -> str:
    return f"{share * 100:.2f} %" if share >= 0.0001 or share == 0 else f"{share * 100:.2g} %"


def _bytes(size: int) -> str:
    for unit, step in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= step:
            return f"{size / step:.1f} {unit}"
    return f"{size} B"
