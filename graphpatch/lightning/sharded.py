"""A checkpoint that many ranks wrote, as one."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch.distributed import checkpoint as dcp

from .atomic import torn
from .contents import check_loadable

_WEIGHTS = "state_dict."


def check_before_loading(strategy: Any) -> None:
    """Strategies that load a checkpoint themselves ask nobody before: other rules would be shapes that do not fit."""
    slot = strategy.load_checkpoint
    if not (isinstance(slot, partial) and slot.func is _load):
        strategy.load_checkpoint = partial(_load, strategy, slot)


def _load(strategy: Any, original: Callable[..., Any], checkpoint_path: Any, *args: Any, **options: Any) -> Any:
    path = Path(checkpoint_path)
    if path.is_dir():
        _refuse_torn(path)
    if path.exists():
        file = path / "meta.pt" if path.is_dir() else path
        check_loadable(strategy.lightning_module, torch.load(file, map_location="cpu", mmap=True, weights_only=True))
    return original(checkpoint_path, *args, **options)


def read_sharded(folder: Path) -> dict[str, Any]:
    """What a folder of `ModelParallelStrategy` holds, less the optimizer: its tensors put together, on one process.

    Raises `ApplyError` (GP833) where the folder is none, or was not written to its end.
    """
    _refuse_torn(folder)
    facts = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    weights = {
        name: torch.empty(about.size, dtype=about.properties.dtype)  # type: ignore[union-attr]
        for name, about in facts.items()
        if name.startswith(_WEIGHTS)
    }
    _read_alone(weights, folder)
    meta = torch.load(folder / "meta.pt", map_location="cpu", weights_only=True)
    return {**meta, "state_dict": {name.removeprefix(_WEIGHTS): tensor for name, tensor in weights.items()}}


def _read_alone(weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Fill the tensors, whether other ranks do so too or not."""
    if "no_dist" in signature(dcp.load).parameters:
        dcp.load(weights, checkpoint_id=folder, no_dist=True)
        return
    with warnings.catch_warnings():  # PyTorch 2.6 has no other way that is public
        warnings.simplefilter("ignore", FutureWarning)
        dcp.load_state_dict(weights, dcp.FileSystemReader(folder), no_dist=True)


def _refuse_torn(folder: Path) -> None:
    if not (folder / ".metadata").is_file() or not (folder / "meta.pt").is_file():
        raise torn(folder)
