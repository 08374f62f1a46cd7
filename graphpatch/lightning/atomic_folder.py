"""Sharded checkpoints, which are folders, that are there as a whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..lang.diagnostics import refusal
from .atomic import STRAY, is_sharded, remove, sweep, sync_folder


def write_whole_folders(strategy: Any, companions: Sequence[Callable[[Path], None]] = ()) -> None:
    """Strategies that write checkpoints themselves do so where their ranks find it: in place, over the last one.

    Each of `companions` is called on all ranks with the path of what was written, to write something beside it.
    """
    slot = strategy.save_checkpoint
    if not (isinstance(slot, partial) and slot.func is _save):
        strategy.save_checkpoint = partial(_save, strategy, slot, companions)


def _save(
    strategy: Any,
    original: Callable[..., None],
    companions: Sequence[Callable[[Path], None]],
    checkpoint: dict[str, Any],
    filepath: Any,
    storage_options: Any | None = None,
) -> None:
    """Written beside its place by all ranks, and renamed by the first when all have done."""
    if "://" in str(filepath) or storage_options is not None:
        original(checkpoint, filepath, storage_options=storage_options)
        return
    path, process = strategy.broadcast((str(filepath), os.getpid()))
    path = Path(path)
    if path.is_dir() and not is_sharded(path) and any(path.iterdir()):
        raise refusal("GP817", f"{path} is a directory, and no checkpoint", "save to another path")
    beside = path.with_name(f"{path.name}{STRAY}{process}")
    if strategy.is_global_zero:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent)
        remove(beside)
    strategy.barrier()
    original(checkpoint, beside)
    strategy.barrier()
    if strategy.is_global_zero:
        _put(beside, path, process)
    strategy.barrier()
    for companion in companions:
        companion(path)


def _put(beside: Path, path: Path, process: int) -> None:
    """No folder can be renamed onto another; between the two renames there are two whole ones, and `sweep` and
    `last_whole` know their names."""
    for file in beside.iterdir() if beside.is_dir() else ():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    old = path.with_name(f"{path.name}.old{STRAY}{process}")
    if path.is_dir() or (beside.is_dir() and path.exists()):
        remove(old)
        os.replace(path, old)
    os.replace(beside, path)
    sync_folder(path.parent)
    remove(old)
