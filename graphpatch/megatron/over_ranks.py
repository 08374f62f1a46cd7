"""Rules on a model that stands on several ranks: one plan for the whole of it, of which each rank does its part."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from os import PathLike, fspath
from typing import Any, overload

from torch import nn

from ..patch.apply import apply_bound
from ..patch.patch import Patch
from ..plan.plan import Plan, Step
from ..plan.ruleset import RuleSet, load
from ..tree.tree import Tree
from .freeze import freeze_anew, part_of_grads
from .ranks import agree, all_or_none, alone, refuse_different, told
from .recompute import let_gradients_in
from .whole import expert_rank, merged, numbered

Rules = str | PathLike[str] | RuleSet


def plan(
    model: nn.Module | Sequence[nn.Module],
    rules: Rules,
    /,
    *,
    adapter: str | None = None,
    allow_import: str | Sequence[str] = (),
    **params: Any,
) -> Plan:
    """What `rules` would do to the whole model, of which `model` is this rank's part: a `GPTModel`, or the list of its
    virtual chunks. Called on every rank, each of which gets the same plan, or the same error.

    `layers[5]` is layer 5 of the whole model, and `expect` counts over it. Raises `RuleError`, `PlanError`, or
    `ApplyError`: GP931 where ranks have other rules, GP930 for what happened to another rank.
    """
    return _planned(_chunks(model), rules, adapter, allow_import, params)[0]


@overload
def apply(model: nn.Module, rules: Rules, /, **options: Any) -> Patch: ...
@overload
def apply(model: Sequence[nn.Module], rules: Rules, /, **options: Any) -> list[Patch]: ...
def apply(
    model: nn.Module | Sequence[nn.Module],
    rules: Rules,
    /,
    *,
    adapter: str | None = None,
    allow_import: str | Sequence[str] = (),
    initialise: bool = True,
    tell: Callable[[Plan], None] | None = None,
    **params: Any,
) -> Patch | list[Patch]:
    """`plan`, and this rank's part of it carried out: on all ranks, or on none. Gives a patch for a model, and a list
    for a list of chunks. `tell` is given the plan of the whole."""
    chunks = _chunks(model)
    whole, trees = _planned(chunks, rules, adapter, allow_import, params)
    for diagnostic in whole.warnings:
        warnings.warn(diagnostic.render(), stacklevel=2)
    if tell is not None:
        tell(whole)
    patches = _carried_out(whole, chunks, trees, initialise)
    return patches if isinstance(model, (list, tuple, nn.ModuleList)) else patches[0]


def _chunks(model: nn.Module | Sequence[nn.Module]) -> list[nn.Module]:
    return list(model) if isinstance(model, (list, tuple, nn.ModuleList)) else [model]  # type: ignore[list-item]


def _planned(
    chunks: Sequence[nn.Module],
    rules: Rules,
    adapter: str | None,
    allow_import: str | Sequence[str],
    params: dict[str, Any],
) -> tuple[Plan, list[Tree]]:
    def read() -> tuple[RuleSet, list[Tree]]:
        found = load(rules, **params) if isinstance(rules, (str, PathLike)) else rules
        return found, [numbered(Tree.of(chunk), expert_rank()) for chunk in chunks]

    found, trees = all_or_none(read)
    if alone() and len(trees) == 1:
        return found.plan(trees[0], adapter=adapter, allow_import=allow_import), trees
    said = [source.text for source in found.program.files if not source.packaged] or [_name(rules)]
    given = f"params {found.program.params}, adapter {adapter}" if found.program.params or adapter else ""
    refuse_different("rules", told("\n".join([*said, given])), "give every rank the same rule file and params")
    return found.plan(whole_tree(trees), adapter=adapter, allow_import=allow_import), trees


def whole_tree(trees: Sequence[Tree]) -> Tree:
    """The tree of the whole model, of which `trees` are this rank's parts. Without live modules, but where the part is
    the whole."""
    if alone() and len(trees) == 1:
        return trees[0]
    # Each text once: ranks of tensor and data parallelism have the same.
    texts = dict.fromkeys(text for rank in told([tree.to_text() for tree in trees]) for text in rank)
    return merged([Tree.from_text(text) for text in texts])


def _name(rules: Rules) -> str:
    return rules.name if isinstance(rules, RuleSet) else fspath(rules)


def _carried_out(whole: Plan, chunks: Sequence[nn.Module], trees: Sequence[Tree], initialise: bool) -> list[Patch]:
    done: list[Patch] = []
    try:
        for chunk, tree in zip(chunks, trees):
            done.append(_agreed(part_of(whole, tree), chunk, tree, initialise))
        freeze_anew(whole, chunks, done)
    except Exception:
        for patch in reversed(done):
            patch.revert()
        raise
    return done


def _agreed(part: Plan, chunk: nn.Module, tree: Tree, initialise: bool) -> Patch:
    """Carry out a part. The ranks ask each other twice: before anything changes, and when it has changed."""
    asked: list[bool] = []
    agreed: list[bool] = []

    def ready() -> None:
        asked.append(True)
        agree(None)
        agreed.append(True)

    patch, error = None, None
    try:
        patch = apply_bound(part, chunk, tree, initialise=initialise, ready=ready)
    except Exception as raised:
        error = raised
    if not asked:
        agree(error)
    elif not agreed:  # another could not, and all know
        assert error is not None
        raise error
    try:
        agree(error)
    except Exception:
        if patch is not None:
            patch.revert()
        raise
    assert patch is not None
    let_gradients_in(patch, chunk)
    return patch


def part_of(whole: Plan, tree: Tree) -> Plan:
    """What of a plan is to be done to the modules of `tree`."""
    if whole.tree is tree:
        return whole
    here = {node: at for node, path in enumerate(whole.tree.paths) if (at := tree.find(path)) is not None}
    there = {at: node for node, at in here.items()}

    at_end = tree.signature(0).attributes.get("post_process") is not False

    def local(steps: Sequence[Step]) -> list[Step]:
        mine = (step for step in steps if at_end or not (step.op.at_end and step.nodes == [0]))
        found = (replace(step, nodes=[here[node] for node in step.nodes if node in here]) for step in mine)
        return [step for step in found if step.nodes]

    grads = whole.grads and part_of_grads(whole.grads, here, there)
    part = replace(whole, tree=tree, steps=local(whole.steps), already=local(whole.already), grads=grads)
    part.__dict__["id"] = whole.id  # by which the patches of all ranks are one
    return part
