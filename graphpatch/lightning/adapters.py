"""Adapter directories beside checkpoints, for who loads without Lightning."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from ..checkpoint.peft.export import to_peft
from ..checkpoint.save import save_adapter
from ..patch.patch import patches
from .atomic import companion_of


def write_adapters(module: nn.Module, peft: bool, checkpoint: Path) -> None:
    """What each patch of `module` added, into `last.adapter` beside `last.ckpt`; of several, into a directory each."""
    here = patches(module)
    for patch in here:
        folder = companion_of(checkpoint)
        if len(here) > 1:
            folder = folder / (patch.record["adapter"] or "default")
        if peft:
            to_peft(patch, folder)
        else:
            save_adapter(patch, folder)
