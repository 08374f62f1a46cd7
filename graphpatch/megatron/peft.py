"""An adapter that was trained over ranks, under Hugging Face names and in PEFT's format."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from ..checkpoint.mapped.load import world_of
from ..checkpoint.peft.files import write_files
from ..checkpoint.peft.mapped import mapped
from ..patch.over_ranks import parts
from ..patch.patch import Patch, patches
from ..plan.rules import maps_in_force
from ..plan.scope import World
from ..tree.tree import Tree
from .files import whole_adapter
from .ranks import all_or_none, rank


def to_peft(patch: Patch | Sequence[Patch], directory: str | PathLike[str]) -> None:
    """Write the adapter that `patch` (or the patches of virtual chunks) added, as PEFT writes one, for the Hugging Face
    model that the model's `map` statements read. Called on every rank; the first writes.

    Raises `Error` on all ranks: GP952 where no rules on the model have maps, or they know nothing of a module; GP625
    for what PEFT cannot express; GP604 where the files cannot be written.
    """
    every = parts(patch)
    whole = whole_adapter(every)

    def write() -> None:
        world = _maps(every, whole.plan.tree)
        if rank() == 0:
            write_files(Path(directory), *mapped(whole.plan, whole.added, whole.moved, world))

    all_or_none(write)


def _maps(every: Sequence[Patch], tree: Tree) -> World:
    """The rules on the model that have maps, of the adapter or beside it; with no maps if there are none."""
    worlds = (World(world_of(on).program, tree) for part in every for on in patches(part.model))
    return next((world for world in worlds if maps_in_force(world)), World(world_of(every[0]).program, tree))
