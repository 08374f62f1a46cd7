"""Ops with their arguments worked out: from `with lora(rank=$rank)` and its targets to `Lora(rank=16)` on nodes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..lang.diagnostics import Diagnostic, Error
from ..lang.syntax import OpCall
from ..ops.op import Op, Refusal, Target
from ..tree.compress import compress
from ..tree.tree import Parameter, Tensor, Tree
from .opcall import build_op
from .plan import Step
from .reach import Reach
from .rules import Rule
from .target import Hit, TargetScope, by_difference, config_index, needs, owner, split


@dataclass
class Draft:
    """One op of one rule on some of its targets, before conflicts are judged."""

    rule: Rule
    order: tuple[int, int]
    """Of the rule among all, and of the op in its chain."""
    op: Op
    call: OpCall
    hits: list[Hit]


def drafts(tree: Tree, reached: Sequence[Reach], adapter: str | None, findings: list[Diagnostic]) -> list[Draft]:
    """The ops of all rules on what they reach; wrong names, arguments and chains go to `findings`."""
    made: list[Draft] = []
    for number, one in enumerate(reached):
        rule = one.rule
        chain: list[Draft] = []
        try:
            for at, call in enumerate(rule.statement.ops):  # type: ignore[union-attr]
                for op, hits in _ops(tree, one, call, adapter):
                    chain.append(Draft(rule, (number, at), op, call, hits))
        except Error as error:
            findings += error.diagnostics
            continue
        findings += _against_levels(rule, chain)
        made += chain
    return made


def _ops(tree: Tree, reached: Reach, call: OpCall, adapter: str | None) -> Sequence[tuple[Op, list[Hit]]]:
    """The op for each group of targets that its arguments tell apart; groups whose op comes out equal are one."""
    rule = reached.rule
    what = needs(call.args, rule.target.captures)
    if what.constant:
        op = build_op(call, rule.scope).named(adapter)
        return [(op, reached.hits())] if len(reached) else []
    made: dict[Op, list[Hit]] = {}
    for facts, hits in by_difference(tree, rule.hits, reached.hits(), what):
        op = build_op(call, TargetScope(rule.scope, facts, strict=True)).named(adapter)
        made.setdefault(op, []).extend(hits)
    return [(op, sorted(hits, key=lambda h: (owner(h), str(h)))) for op, hits in made.items()]


def _against_levels(rule: Rule, chain: Sequence[Draft]) -> list[Diagnostic]:
    by_position = {draft.order[1]: draft for draft in chain}
    ordered = [by_position[at] for at in sorted(by_position)]
    for inner, outer in pairwise(ordered):
        if inner.op.depth > outer.op.depth:
            return [
                rule.scope.finding(
                    "GP416",
                    f"`{inner.op.op} then {outer.op.op}` goes against the order in which they wrap",
                    outer.call.span,
                    f"`{outer.op.op}` is the inner one: write `{outer.op.op}(...) then {inner.op.op}(...)`",
                )
            ]
    return []


def steps(tree: Tree, draft: Draft, findings: list[Diagnostic]) -> list[Step]:
    """The draft's targets by signature, each checked by the op; refusals go to `findings`."""
    groups: dict[_Alike, list[int]] = {}
    configs: dict[int, int] = {}  # by parent: what is asked of every hit must cost nothing
    for hit in draft.hits:
        node, parameter = (hit, None) if isinstance(hit, int) else hit
        parent = tree.parents[node]
        if parent not in configs:
            configs[parent] = config_index(tree, parent)
        own = tree.signatures[tree.signature_of[node]].config
        config = own if own >= 0 else configs[parent]
        key = (tree.signature_of[node], tree.signature_of[parent] if parent >= 0 else -1, parameter, config)
        groups.setdefault(key, []).append(node)
    merged: dict[tuple[int, str | None, Op, str, tuple[tuple[str, Tensor], ...]], Step] = {}
    refused: dict[tuple[str, tuple[str, ...], str], list[Hit]] = {}
    seated = type(draft.op).seat is not Op.seat
    units = _by_ties(tree, groups)
    if seated:
        units = ((key, [node], tied, later) for key, nodes, tied, later in units for node in nodes)
    for (signature, parent, parameter, config), nodes, tied, later in units:
        facts = tree.signatures[signature]
        above = tree.signatures[parent] if parent >= 0 else None
        around = tree.configs[config] if config >= 0 else None
        dtype = _dtype(tree, nodes[0])
        target = Target(_path(tree, nodes[0]), facts, parameter, above, tied, later, around, dtype)
        carriers = nodes
        if seated:
            carriers, target = _seated(tree, draft.op, nodes, target)
            signature = tree.signature_of[carriers[0]]
        try:
            op = draft.op.resolved(target)
            rewrite = _rewrite(op, target, tree.has_classes)
            op.check(target)
            adds: dict[str, Tensor] = op.adds(target)
            there = [step.op for step in merged.values() if carriers[0] in step.nodes] if seated else []
            if there and all(op.repeats(other, target) for other in there):
                continue
            if there:
                carrier = _path(tree, carriers[0]) or "^"
                raise Refusal(f"`{carrier}` would carry it twice, for this and for another target", code="GP451")
        except Refusal as refusal:
            why = (str(refusal), tuple(refusal.fixes), refusal.code)
            refused.setdefault(why, []).extend(nodes if parameter is None else [(n, parameter) for n in nodes])
            continue
        alike = (signature, parameter, op, rewrite, tuple(adds.items()))
        if alike in merged:
            merged[alike].nodes.extend(carriers)
            continue
        merged[alike] = Step(
            op, draft.rule.where, draft.rule.label, carriers, parameter, rewrite, adds,
            target.seat.cls or "?", op.after(target), op.represents(target), op.drops(target),
        )  # fmt: skip
    for step in merged.values():
        step.nodes.sort()
    findings += _refusals(tree, draft, refused)
    return list(merged.values())


def _seated(tree: Tree, op: Op, nodes: list[int], target: Target) -> tuple[list[int], Target]:
    """The module that carries the change, where the op names another than its target, of which there is one."""
    way = tree.ancestors(nodes[0])
    at = op.seat([tree.signature(n) for n in way])
    if way[at] == nodes[0]:
        return nodes, target
    path = ".".join(tree.names[n] for n in way[at + 1 :])
    return [way[at]], target._replace(carrier=tree.signature(way[at]), path_in_seat=path)


_Alike = tuple[int, int, str | None, int]
"""What targets are grouped by: their signature, their parent's, the parameter's name, and the config around them."""


def _by_ties(
    tree: Tree, groups: Mapping[_Alike, list[int]]
) -> Iterator[tuple[_Alike, list[int], Mapping[str, tuple[str, ...]], frozenset[str]]]:
    """The groups, and apart from them each node that shares a parameter with another, with the paths of that, and those
    that another has first."""
    ties: dict[int, dict[str, tuple[str, ...]]] = {}
    same: dict[Parameter, list[Parameter]] = {}
    for alias, first in tree.ties:
        same.setdefault(first, [first]).append(alias)
    for tied in same.values():
        for node, name in tied:
            others = tuple(f"{_path(tree, n)}.{p}".lstrip(".") for n, p in tied if n != node)
            if others:
                ties.setdefault(node, {})[name] = others
    for key, nodes in groups.items():
        apart = [node for node in nodes if node in ties] if ties else []
        for node in apart:
            yield key, [node], ties[node], frozenset(name for name in ties[node] if (node, name) in tree.first_of)
        if len(apart) < len(nodes):
            yield key, [node for node in nodes if node not in ties] if apart else nodes, {}, frozenset()


def _path(tree: Tree, node: int) -> str:
    """One path, without making them all."""
    return ".".join(tree.names[n] for n in tree.ancestors(node)[1:])


def _dtype(tree: Tree, node: int) -> str:
    """Of the first floating-point parameter at or below a node, else of the model's."""
    for number in (*range(node, tree.ends[node]), *range(node)):
        for tensor in tree.signature(number).parameters.values():
            if "float" in tensor.dtype:
                return tensor.dtype
    return "float32"


def _rewrite(op: Op, target: Target, has_classes: bool) -> str:
    """The import path of the rewrite: the first class of the target's MRO that stands in the op's table."""
    table = op.accepts if target.parameter is None else op.accepts_parameters
    if not table and target.parameter is not None:
        raise Refusal(
            f"`{op.op}` changes modules, and `{target.parameter}` is a parameter of "
            f"{target.signature.cls or 'a module'}",
            "end the selector at the module",
        )
    if not has_classes and table:
        return next(iter(table.values()))
    for name in (*target.signature.mro, "*"):
        if name in table:
            return op.through(target, table[name])
    takes = ", ".join(sorted(name.rpartition(".")[2] for name in table))
    if target.parameter is not None:
        why = f"`{op.op}` does not accept `{target.parameter}`, a parameter of {target.signature.cls}"
        raise Refusal(why, f"it accepts parameters of {takes}; end the selector at a module, or leave it out")
    inside = [f"{target.path}.{name}".lstrip(".") for name in target.signature.parameters if _takes(op, target, name)]
    raise Refusal(
        f"`{op.op}` does not accept {target.signature.cls}",
        *([f"it accepts its parameters: patch {' | '.join(f'^{path}' for path in inside)}"] if inside else []),
        f"it accepts {takes}; narrow the selector, `:Linear` say",
    )


def _takes(op: Op, target: Target, parameter: str) -> bool:
    one = target._replace(parameter=parameter)
    try:
        if op.accepts_parameters:
            _rewrite(op, one, True)
            op.check(one)
    except Refusal:
        return False
    return bool(op.accepts_parameters)


def _refusals(tree: Tree, draft: Draft, refused: dict[tuple[str, tuple[str, ...], str], list[Hit]]) -> list[Diagnostic]:
    found = []
    for (why, fixes, code), hits in refused.items():
        paths = compress(tree, *split(hits))
        few = ", ".join(p.removeprefix("^") or "^" for p in paths[:2]) + (
            f" and {len(paths) - 2} more" if len(paths) > 2 else ""
        )
        found.append(
            draft.rule.scope.finding(
                code, f"`{few}` cannot take {draft.op.op}", draft.call.span, "", fixes, text=(why,)
            )
        )
    return found
