"""Carry out a plan: all of it, or nothing."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..lang.diagnostics import ApplyError, Diagnostic, Error
from ..tree.collection import no_collection
from ..tree.tree import Tree
from .approach import approach, refuse_unknown
from .change import Change, ModuleChange, WeightChange
from .drift import bind, unwrapped
from .grads import set_flags, set_single_flags, still
from .imports import brief
from .in_place import InPlaceChange
from .observe import observe
from .over_ranks import over_ranks
from .patch import Patch, adapter_changes, undo
from .preflight import Preflight
from .record import JOURNALS, Journal, journals_of, roots_in
from .refuse import refuse_distributed, refuse_selected

if TYPE_CHECKING:
    from ..plan.plan import Plan
    from ..plan.ruleset import RuleSet


def apply(
    model: nn.Module,
    rules: str | PathLike[str] | RuleSet,
    /,
    *,
    adapter: str | None = None,
    allow_import: str | Sequence[str] = (),
    batches: Iterable[Any] | None = None,
    **params: Any,
) -> Patch:
    """Plan `rules` (a file, a packaged name, or what `load` and `parse` give) against `model`, and apply the plan.

    `params` are the values of the rules' params; `adapter` names the adapter they add; `allow_import` are patterns of
    import paths (`"mypkg.*"`) that `replace` and `wrap` may import. What the plan warns of is warned of here.
    `batches` are for ops that start from data (`lora(init="eva")`): each is a dict of keyword arguments, a tuple or
    list of positional ones, or a single value. They are run once, in eval mode without gradients, before all else.

    A megatron-core model that stands on several ranks is a whole: see `graphpatch.megatron.apply`, which is what is
    called then, on every rank.

    Raises `RuleError`, `PlanError` or `ApplyError`; then nothing has changed.
    """
    whole = over_ranks(model, "apply")
    if whole is not None:
        if batches is not None:
            fix = "another init: a rank sees a part of the model alone"
            raise ApplyError(Diagnostic("GP932", "a model over several ranks cannot start from batches", fixes=(fix,)))
        return whole(model, rules, adapter=adapter, allow_import=allow_import, **params)  # type: ignore[no-any-return]
    if isinstance(rules, (str, PathLike)):
        from ..plan.ruleset import load

        rules = load(rules, **params)
    elif params:
        names = ", ".join(params)
        fix = f"graphpatch.load(file, {names}=...), or give apply the file itself"
        raise ApplyError(Diagnostic("GP519", f"a loaded rule set has its params already: {names}", fixes=(fix,)))
    plan = rules.plan(model, adapter=adapter, allow_import=allow_import)
    for diagnostic in plan.warnings:
        warnings.warn(diagnostic.render(), stacklevel=2)
    # The tree was taken of this model a moment ago: no need to ask whether it still holds.
    return _carried(plan, model) or _carry_out(plan, model, plan.tree, plan.allow_import, fresh=True, batches=batches)


def apply_plan(
    plan: Plan,
    model: nn.Module,
    allow_import: Sequence[str] = (),
    *,
    initialise: bool = True,
    batches: Iterable[Any] | None = None,
) -> Patch:
    """Change `model` as `plan` says and return the handle; the same handle where the model carries this plan already.

    Without `initialise` what is added has no values yet, for a caller that brings them.
    Raises `ApplyError` where the model is not the one planned for, or cannot be changed; then nothing has changed.
    An interruption (KeyboardInterrupt) is passed on, after everything was taken back.
    """
    known = _carried(plan, model)
    allowed = (*plan.allow_import, *allow_import)
    tree = bind(plan.tree, model) if known is None else plan.tree
    return known or _carry_out(plan, model, tree, allowed, initialise=initialise, batches=batches)


def apply_bound(
    plan: Plan,
    model: nn.Module,
    tree: Tree,
    *,
    initialise: bool = True,
    ready: Callable[[], None] | None = None,
) -> Patch:
    """The same for a plan whose nodes are those of `tree`, which was taken of `model` and has its modules; it may be a
    part of a plan, and then what trains is decided on the whole afterwards, by the caller, where modules are added.

    `ready` is called when everything that can be refused was looked at, and nothing has changed yet; what it raises is
    passed on. It is not called where the model carries the plan already.
    """
    return _carried(plan, model) or _carry_out(
        plan, model, tree, plan.allow_import, initialise=initialise, ready=ready, part=True
    )


def _carried(plan: Plan, model: nn.Module) -> Patch | None:
    """The handle of this very plan, where the model carries it."""
    root = unwrapped(model)
    return next((Patch(root, journal) for journal in journals_of(root) if journal.id == plan.id), None)


def _carry_out(
    plan: Plan,
    model: nn.Module,
    tree: Tree,
    allow_import: Sequence[str],
    fresh: bool = False,
    initialise: bool = True,
    batches: Iterable[Any] | None = None,
    ready: Callable[[], None] | None = None,
    part: bool = False,
) -> Patch:
    root = unwrapped(model)
    nodes = [node for step in plan.steps for node in step.nodes]
    patched = roots_in(tree)
    refuse_selected(model, patched)
    refuse_distributed(model, tree, nodes)
    changes = Preflight(plan.id, tree, plan.grads, allow_import, fresh, initialise).changes(plan.steps)
    refuse_unknown(changes, root, tree.paths)
    observe(model, changes, batches, tree.paths)
    _join(changes, patched)
    if ready is not None:
        ready()

    journal = Journal(plan.id, plan.record, tree.names, tree.parents)
    try:
        # Parameters made in inference mode could never be trained.
        with torch.inference_mode(False), torch.no_grad(), no_collection():
            anew = not part and any(
                isinstance(c, ModuleChange) or (isinstance(c, InPlaceChange) and c.children) for c in changes
            )
            before = list(root.parameters()) if anew else []
            if plan.grads is not None and not anew:
                # Before anything is added, what is added need not be passed over.
                set_flags(tree, plan.grads, journal.flags)
            for change in changes:
                journal.changes.append(change)
                change.do()
            still(changes, journal.flags)
            if plan.grads is not None and not anew:
                set_single_flags(tree, plan.grads, journal.flags)
            elif anew:
                _freeze_anew(plan, tree, root, journal, before)
            root.__dict__[JOURNALS] = [*journals_of(root), journal]
            approach(changes, root)
        for change in changes:
            if isinstance(change, WeightChange):
                change.settle()
    except BaseException as error:
        undo(root, journal)
        if isinstance(error, Error) or not isinstance(error, Exception):
            raise
        raise ApplyError(
            Diagnostic(
                "GP510",
                "applying failed half-way, and the model is as it was before",
                text=(brief(error),),
            )
        ) from error
    return Patch(root, journal)


def _join(changes: Sequence[Change], patched: Sequence[nn.Module]) -> None:
    """What adds to an adapter that is there is active, and weighted, as that is."""
    journals = [journal for root in patched for journal in journals_of(root)]
    there = {change.entry.adapter: change for journal in journals for change in adapter_changes(journal)}
    for change in changes if there else ():
        if isinstance(change, InPlaceChange) and hasattr(change.entry, "adapter") and change.entry.adapter in there:
            known = there[change.entry.adapter]
            change.active, change.weight = known.active, known.weight


def _freeze_anew(plan: Plan, tree: Tree, root: nn.Module, journal: Journal, before: Sequence[nn.Parameter]) -> None:
    """Decide the flags on the model as it stands: no plan can know what modules that were just built are and hold.
    `before` are the parameters that the model had."""
    # A plan made on another model of the same shape, or read from a file, has not these modules.
    bound = plan if plan.tree is tree else replace(plan, tree=tree)
    now = bound.refreeze(root, before)
    if now is not None:
        set_flags(now.tree, now.grads, journal.flags, now.added)
        set_single_flags(now.tree, now.grads, journal.flags)
