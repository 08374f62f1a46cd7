"""Values for a patched model, whichever file they come from: all of them put in place, or none."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from ..lang.diagnostics import Diagnostic
from ..patch.patch import Patch
from ..tree.tree import Mark, Tree
from .moved import MovedWeights
from .tensors import Named, added_tensors, base_place, check, journal_of, put, tensor_at


def fill(patch: Patch, tensors: Named, what: str, remember: Sequence[str] = ()) -> None:
    """Put the tensors into the patched model. What `remember` names is noted, and given back by `revert()`."""
    targets = added_tensors(patch)
    places = {}
    tree = Tree.of(patch.model) if any(key not in targets for key in tensors) else None
    for key in tensors:
        place = base_place(tree, key) if tree is not None and key not in targets else None
        if place is not None:
            places[key] = place
    base = {key: tensor_at(place) for key, place in places.items()}
    check(tensors, {**targets, **base}, what)
    originals = {key: base[key].clone() for key in remember}  # type: ignore[union-attr]
    put(tensors, {**targets, **base})
    if originals:
        journal = journal_of(patch)
        mark = Mark(patch.id, what, "load_adapter", frozenset())
        journal.changes.append(MovedWeights(mark, {key: places[key] for key in originals}, originals))


def warn_of_moved(folder: str, moved: Sequence[str]) -> None:
    shown = ", ".join(moved[:4]) + (", ..." if len(moved) > 4 else "")
    diagnostic = Diagnostic(
        "GP620",
        f"{folder} brings weights of the base, and other patches on this model rest on those that are there",
        text=(shown,),
        fixes=("`freeze ** except @new` makes adapters that stand beside each other",),
        severity="warning",
    )
    warnings.warn(diagnostic.render(), stacklevel=3)


@contextmanager
def random_state_kept(model: nn.Module) -> Iterator[None]:
    """New factors are drawn, and then replaced: a training run that goes on shall not notice."""
    cuda = {p.device.index for p in model.parameters() if p.device.type == "cuda" and p.device.index is not None}
    with torch.random.fork_rng(sorted(cuda)):
        yield
