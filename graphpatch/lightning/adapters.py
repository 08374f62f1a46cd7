"""Adapter directories beside checkpoints, for who loads without Lightning."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from ..checkpoint.peft.export import to_peft
from ..checkpoint.save import save_adapter
from ..patch.patch import Patch, patches
from .atomic import companion_of


def write_adapters(module: nn.Module, peft: bool, checkpoint: Path) -> None:
    """What the patches of `module` added, into `last.adapter` beside `last.ckpt`; of several adapters, into a directory
    each. Where ranks share the model, all call it."""
    adapters: dict[str, list[Patch]] = {}
    for patch in patches(module):
        adapters.setdefault(patch.id, []).append(patch)  # virtual chunks have a patch each
    for here in adapters.values():
        folder = companion_of(checkpoint)
        if len(adapters) > 1:
            folder = folder / (here[0].record["adapter"] or "default")
        which = here if len(here) > 1 else here[0]
        if peft:
            to_peft(which, folder)
        else:
            save_adapter(which, folder)
