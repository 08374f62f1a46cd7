"""Rules x tree -> Plan: resolve, match, check, sum up. Nothing here changes anything."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from ..lang.diagnostics import Diagnostic, PlanError, RuleError
from ..ops.op import Op
from ..tree.compress import compress
from ..tree.tree import Mark, Parameter, Tree
from .conflicts import settle
from .drafts import Draft, drafts, steps
from .expect import reach_all
from .freeze import (
    Added,
    Grads,
    Scope,
    added_by,
    count_trainable,
    decide,
    dropped_by,
    elements_in,
    freeze_scope,
    represented_by,
)
from .plan import Outcome, Plan, Step, Totals, patterns
from .reach import Reach
from .rules import match_rules, rules_in_force
from .ruleset import RuleSet
from .scope import World
from .ties import check_ties

_BYTES = {"float64": 8, "int64": 8, "float32": 4, "int32": 4, "float16": 2, "bfloat16": 2, "int16": 2}


def make_plan(rules: RuleSet, tree: Tree, adapter: str | None = None, allow_import: str | Sequence[str] = ()) -> Plan:
    """The plan of these rules for this tree.

    Raises `RuleError` or `PlanError` with everything found wrong, not only the first.
    """
    _check_name(adapter)
    world = World(rules.program, tree)
    findings: list[Diagnostic] = []
    if missing := rules.program.missing():
        raise RuleError(missing)
    patches, freezes = rules_in_force(world)
    match_rules(tree, patches)
    reached = reach_all(tree, patches, findings)
    drafted = drafts(tree, reached, adapter, findings)
    _refuse(rules, findings)
    settle(tree, drafted, findings)
    wanted = [step for draft in sorted(drafted, key=_wrapping_order) for step in steps(tree, draft, findings)]
    findings += check_ties(tree, wanted)
    fresh, already = _split_by_marks(tree, wanted, findings)
    _refuse(rules, findings)

    added = added_by(fresh + already)
    match_rules(tree, freezes, added)
    freeze_reached = reach_all(tree, freezes, findings)
    _refuse(rules, findings)
    scopes = [freeze_scope(tree, one) for one in freeze_reached]
    grads = decide(tree, scopes, added) if scopes else None
    findings += _refuse_to_train(tree, fresh, freeze_reached, scopes)
    _refuse(rules, findings)
    totals = _totals(tree, fresh, already, added, grads)
    warnings = [f for f in findings if f.severity != "error"]
    adapters = any("adapter" in type(step.op).model_fields for step in fresh + already)
    if grads is None and adapters and any(t.trainable for s in tree.signatures for t in s.parameters.values()):
        warnings.append(_base_trains(rules))
    return Plan(
        rules=rules,
        tree=tree,
        params=world.params(),
        adapter=adapter,
        steps=fresh,
        already=already,
        outcomes=[*_outcomes(reached, drafted), *_freeze_outcomes(tree, freeze_reached, scopes, added)],
        grads=grads,
        groups=_groups(tree, freeze_reached, scopes, added),
        totals=totals,
        warnings=warnings,
        allow_import=patterns(allow_import),
    )


def _check_name(adapter: str | None) -> None:
    if adapter is not None and not (isinstance(adapter, str) and adapter.isidentifier()):
        fix = "it ends the names of parameters: letters, digits and _"
        raise PlanError(Diagnostic("GP423", f"{adapter!r} cannot name an adapter", fixes=(fix,)))


def _refuse(rules: RuleSet, findings: Sequence[Diagnostic]) -> None:
    if not any(f.severity == "error" for f in findings):
        return
    *others, last = dict.fromkeys(findings)
    raise PlanError([*others, _with_a_copy(rules, last)])


def _with_a_copy(rules: RuleSet, finding: Diagnostic) -> Diagnostic:
    """A packaged file is not the user's to change; a copy of it is."""
    packaged = {file.name for file in rules.program.files if file.packaged}
    place = finding.places[0].source.name if finding.places else ""
    if place not in packaged:
        return finding
    name = place.removesuffix(".rules").replace("/", ".")
    fix = f"{place} comes with graphpatch: `graphpatch rules {name} > my.rules` makes a copy to fit to this model"
    return replace(finding, fixes=(*finding.fixes, fix))


def _wrapping_order(draft: Draft) -> tuple[int, tuple[int, int]]:
    return draft.op.level, draft.order


# ── what the model carries already ──


def _split_by_marks(tree: Tree, wanted: Sequence[Step], findings: list[Diagnostic]) -> tuple[list[Step], list[Step]]:
    """The steps to take, and those whose marks the model carries from an earlier apply of the same rule."""
    if not tree.marks:
        return list(wanted), []
    fresh, already = [], []
    for step in wanted:
        text, slots = step.op.text(), step.slots
        groups: dict[str, list[int]] = {"new": [], "same": [], "clash": []}
        for node in step.nodes:
            groups[_standing(tree.marks.get(node, ()), step, text, slots)].append(node)
        fresh += [replace(step, nodes=groups["new"])] if groups["new"] else []
        already += [replace(step, nodes=groups["same"])] if groups["same"] else []
        if groups["clash"]:
            findings.append(_occupied(tree, step, groups["clash"]))
    return fresh, already


def _standing(marks: Sequence[Mark], step: Step, text: str, slots: frozenset[str]) -> str:
    for mark in marks:
        if mark.op == text and mark.rule == step.rule and mark.slots == slots:
            return "same"
        if mark.exclusive or step.op.exclusive or mark.slots & slots:
            return "clash"
    return "new"


def _occupied(tree: Tree, step: Step, nodes: Sequence[int]) -> Diagnostic:
    marks = tree.marks[nodes[0]]
    mark = next((m for m in marks if m.exclusive or step.op.exclusive or m.slots & step.slots), marks[0])
    of = step.parameter
    paths = compress(tree, [], [(node, of) for node in nodes]) if of else compress(tree, list(nodes))
    kind = ("parameter" if of else "module") + "s" * (len(nodes) != 1)
    return Diagnostic(
        "GP417",
        f"{step.op.op} has no place on {paths[0].removeprefix('^')}: an earlier patch is there",
        text=(f"{step.rule} says {step.op.text()}, and {mark.rule} put {mark.op} there ({len(nodes)} {kind})",),
        fixes=(
            'give the new one a name of its own: apply(..., adapter="second")',
            "or take the earlier one back first: graphpatch.patches(model)[-1].revert()",
        ),
    )


# ── freeze and train ──


def _base_trains(rules: RuleSet) -> Diagnostic:
    return Diagnostic(
        "GP420",
        f"{rules.name} adds adapters and freezes nothing, so the base trains too",
        fixes=("`freeze ** except @new` trains what was added and nothing else",),
        severity="warning",
    )


def _groups(tree: Tree, reached: Sequence[Reach], scopes: Sequence[Scope], added: Added) -> dict[str, list[str]]:
    """Optimizer groups: what each labelled `train` rule covers."""
    groups: dict[str, list[str]] = {}
    for one, scope in zip(reached, scopes, strict=True):
        label = one.rule.label
        if label and scope.trainable:
            parameters = list(_parameters_in(tree, scope, added))
            old = [p for p in parameters if p[1] in tree.signature(p[0]).parameters]
            new = [p for p in parameters if p[1] not in tree.signature(p[0]).parameters]
            groups[label] = compress(tree, [], old) + compress(tree, [], new)
    return groups


def _parameters_in(tree: Tree, scope: Scope, added: Added) -> Iterable[Parameter]:
    aliases = {alias for alias, _ in tree.ties}
    for start, end in scope.hits.intervals:
        for node in range(start, end):
            names: list[str] = list(tree.signature(node).parameters)
            if not scope.except_new:
                names += added.get(node, {})
            for name in names:
                if (node, name) not in aliases and not scope.excepted.covers((node, name)):
                    yield node, name
    for parameter in sorted(scope.hits.parameters):
        if parameter[0] not in scope.hits and not scope.excepted.covers(parameter):
            yield parameter
    if scope.new and not scope.except_new:
        for node, tensors in sorted(added.items()):
            yield from ((node, name) for name in tensors if not scope.excepted.covers((node, name)))


def _refuse_to_train(
    tree: Tree, steps: Sequence[Step], reached: Sequence[Reach], scopes: Sequence[Scope]
) -> Iterable[Diagnostic]:
    """A quantised weight that a `train` names itself, one that names the module passes over it, as over integers; and a
    `train` that names nothing but what is not there any more."""
    quantised, dropped = represented_by(steps), dropped_by(steps)
    for one, scope in zip(reached, scopes, strict=True):
        if scope.trainable and scope.hits.parameters and not scope.hits.intervals and scope.hits.parameters <= dropped:
            path = tree.parameter_paths(min(scope.hits.parameters))[0]
            yield one.rule.scope.finding(
                "GP464",
                f"`{path}` is dropped by these rules, and cannot be trained",
                one.rule.statement.span,
                "it will not be there",
                ("leave this `train` out",),
            )
        named = sorted(scope.hits.parameters & quantised) if scope.trainable else []
        if named:
            path = tree.parameter_paths(named[0])[0]
            yield one.rule.scope.finding(
                "GP464",
                f"`{path}` is quantised by these rules, and cannot be trained",
                one.rule.statement.span,
                "codes have no gradient",
                ("train what is added beside it: `train @new`", f"or leave it dense: except ^{path}"),
            )


# ── sums and reports ──


def _totals(tree: Tree, fresh: Sequence[Step], already: Sequence[Step], added: Added, grads: Grads | None) -> Totals:
    keys = moved = elements = size = quantised = dense = kept = dropped = keys_dropped = 0
    for step in fresh:
        times = len(step.nodes)
        keys += times * len(step.adds)
        elements += _elements(step)
        size += times * sum(t.numel * _BYTES.get(t.dtype, 1) for t in step.adds.values())
        for name, bytes_then in step.represents.items():
            tensor = tree.signature(step.nodes[0]).parameters[name]
            quantised += times * bytes_then
            dense += times * tensor.numel * _BYTES.get(tensor.dtype, 1)
            kept += times * tensor.numel * _BYTES.get(tensor.dtype, 1) * getattr(step.op, "keep", False)
        dropped += _gone(tree, step)
        keys_dropped += times * len(step.drops)
        if step.op.exclusive:
            moved += sum(_keys_below(tree, node) for node in step.nodes)
    everything = [*fresh, *already]
    return Totals(
        rewritten=_places(fresh, "~"),
        replaced=_places(fresh, "-/+"),
        added_modules=_places(fresh, "+"),
        parameters_before=tree.numel() + sum(_elements(step) - _gone(tree, step) for step in already),
        parameters_added=elements,
        bytes_added=size,
        trainable=count_trainable(tree, grads, added, represented_by(everything) | dropped_by(everything)),
        keys_added=keys,
        keys_moved=moved,
        bytes_quantised=quantised,
        bytes_dense=dense,
        bytes_kept=kept,
        parameters_dropped=dropped,
        keys_dropped=keys_dropped,
    )


def _places(steps: Sequence[Step], symbol: str) -> int:
    """Modules and parameters that ops of this kind change, each once, however many ops it takes."""
    return len({target for step in steps if step.op.symbol == symbol for target in step.targets()})


def _elements(step: Step) -> int:
    return len(step.nodes) * sum(t.numel for t in step.adds.values() if not t.buffer)


def _gone(tree: Tree, step: Step) -> int:
    return len(step.nodes) * sum(tree.signature(step.nodes[0]).parameters[name].numel for name in step.drops)


def _keys_below(tree: Tree, node: int) -> int:
    signatures = (tree.signature(n) for n in range(node, tree.ends[node]))
    return sum(len(s.parameters) + len(s.buffers) for s in signatures)


def _outcomes(reached: Sequence[Reach], drafted: Sequence[Draft]) -> list[Outcome]:
    texts: dict[int, dict[int, list[Op]]] = {}
    for draft in drafted:
        texts.setdefault(draft.order[0], {}).setdefault(draft.order[1], []).append(draft.op)
    outcomes = []
    for number, one in enumerate(reached):
        chain = texts.get(number, {})
        text = " then ".join(_brief(chain[at]) for at in sorted(chain))
        outcomes.append(Outcome(one.rule.where, text, len(one), one.coverage))
    return outcomes


def _brief(ops: Sequence[Op]) -> str:
    return ops[0].text() if len(ops) == 1 else f"{ops[0].op}(...)"


def _freeze_outcomes(tree: Tree, reached: Sequence[Reach], scopes: Sequence[Scope], added: Added) -> Iterable[Outcome]:
    for one, scope in zip(reached, scopes, strict=True):
        verb = "train" if scope.trainable else "freeze"
        yield Outcome(
            one.rule.where,
            f"{verb} {one.rule.target_text()}" + (f" as {one.rule.label}" if one.rule.label else ""),
            len(one),
            one.coverage,
            frozen=not scope.trainable,
            parameters=elements_in(tree, scope, added),
        )
