"""A checkpoint that many ranks wrote, as one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.distributed import checkpoint as dcp

from .problem import refusal

_WEIGHTS = "state_dict."


def read_sharded(folder: Path) -> dict[str, Any]:
    """What a folder of `ModelParallelStrategy` holds, less the optimizer: its tensors put together, on one process.

    Raises `ApplyError` (GP833) where the folder is none, or was not written to its end.
    """
    if not (folder / ".metadata").is_file() or not (folder / "meta.pt").is_file():
        raise refusal(
            "GP833",
            f"{folder} is no whole sharded checkpoint",
            "graphpatch.lightning.last_whole(folder) finds the newest that is",
        )
    facts = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    weights = {
        name: torch.empty(about.size, dtype=about.properties.dtype)  # type: ignore[union-attr]
        for name, about in facts.items()
        if name.startswith(_WEIGHTS)
    }
    dcp.load(weights, checkpoint_id=folder, no_dist=True)
    meta = torch.load(folder / "meta.pt", map_location="cpu", weights_only=True)
    return {**meta, "state_dict": {name.removeprefix(_WEIGHTS): tensor for name, tensor in weights.items()}}
