"""A patch's adapter, written to disk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path

import torch

from .. import __version__
from ..patch.original import original_plan
from ..patch.over_ranks import over_ranks, parts
from ..patch.patch import Patch
from ..plan.plan import Plan, Step
from ..tree.compress import compress
from ..tree.tree import Tree
from .base import weights_hash
from .intact import refuse_outgrown
from .manifest import FORMAT, Base, Change, Manifest, Tensors
from .moved import brought
from .pair import write_pair
from .tensors import Named, added_tensors, content_hash, copied_out, journal_of, moved_tensors


def save_adapter(patch: Patch | Sequence[Patch], directory: str | PathLike[str], *, hash_base: bool = False) -> None:
    """Write `adapter.safetensors` and `adapter.json` into `directory`, which `load_adapter` reads.

    The tensors are what the patch added, and what of the base is not what it was: weights that the rules train or that
    require grad now, and running statistics. The json holds the rules, what they change, and the base's tree;
    `hash_base` adds a hash of the bytes of all its other weights, so that loading tells a base with the same shapes and
    other weights. The same patch gives the same bytes. An adapter that was there is replaced as a whole: a crash at any
    moment leaves the old one or the new one. Of a sharded model every rank must call this; of one of megatron-core, of
    which each has a part, with its patch (or those of its virtual chunks), and the files are those of the whole.

    Raises `Error`: GP604 where the files cannot be written, with the old ones left, GP605 where there are no values to
    save (the meta device), GP655 where the model has outgrown its patch; `ApplyError` (GP509) where the patch was
    reverted or is switched off, GP953 for a `hash_base` of a model over ranks.
    """
    every = parts(patch)
    first = every[0]
    elsewhere = over_ranks(first.model if len(every) == 1 else [one.model for one in every], "save_adapter")
    if elsewhere is not None:
        return elsewhere(patch, directory, hash_base)  # type: ignore[no-any-return]
    journal_of(first)
    plan = original_plan(first)
    added = added_tensors(first)
    refuse_outgrown(first, plan, added)
    moved = moved_tensors(plan, first.model, added, brought(first))
    write_adapter(plan, added, moved, directory, content_hash(plan.tree, moved) if hash_base else None)


def write_adapter(
    plan: Plan, added: Named, moved: Named, directory: str | PathLike[str], content: str | None = None
) -> None:
    """The files of the adapter that `plan`, made on the base alone, added, with the base's tensors that `moved`, and a
    hash of the base's bytes."""
    tensors = copied_out({**added, **moved})
    tree = plan.tree
    base = Base(
        model=tree.title,
        fingerprint=tree.fingerprint,
        weights=weights_hash(tree),
        content=content,
        tree=replace(tree, source="").to_text().rstrip("\n").split("\n"),  # the same from every device
    )
    manifest = Manifest(
        format=FORMAT,
        adapter=plan.adapter,
        libraries={"graphpatch": __version__, "torch": torch.__version__},
        params=dict(plan.params),
        allow_import=list(plan.allow_import),
        changes=changes_of(plan),
        tensors=Tensors(sha256="0" * 64, added=list(added), base=list(moved)),
        base=base,
        rules=json.loads(plan.rules.to_json()),
    )

    def with_digest(digest: str) -> Manifest:
        return manifest.model_copy(update={"tensors": manifest.tensors.model_copy(update={"sha256": digest})})

    write_pair(Path(directory), tensors, with_digest)


def changes_of(plan: Plan) -> list[Change]:
    """What a plan changes, as a manifest has it: steps that differ in how the base looks alone are one."""
    alike: dict[str, list[Step]] = {}
    for step in plan.steps:
        gains = {name: list(tensor.shape) for name, tensor in step.adds.items()}
        alike.setdefault(json.dumps([step.rule, step.op.op, step.op.arguments(), gains]), []).append(step)
    return [_change(plan.tree, steps) for steps in alike.values()]


def _change(tree: Tree, steps: list[Step]) -> Change:
    first = steps[0]
    nodes = [node for step in steps if step.parameter is None for node in step.nodes]
    parameters = [(node, step.parameter) for step in steps if step.parameter is not None for node in step.nodes]
    return Change(
        rule=first.rule,
        op=first.op.op,
        arguments=first.op.arguments(),
        paths=compress(tree, sorted(nodes), sorted(parameters)),
        count=len(nodes) + len(parameters),
        adds={name: list(tensor.shape) for name, tensor in first.adds.items()},
    )
