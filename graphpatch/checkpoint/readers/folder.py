"""An exported adapter in its folder: made beside it, looked at, and only then put in the place of what was there."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ...lang.diagnostics import Diagnostic, Error
from ..disk import locked, sync, workshop
from ..tensors import copied_out
from .adapter import CONFIG, WEIGHTS, Layout

_WORKSHOP = ".export.partial"


def check_folder(folder: Path, layout: Layout) -> None:
    """Raise `Error` (GP636) where an adapter of this layout would spoil what is in the folder."""
    if folder.exists() and not folder.is_dir():
        raise _spoils(folder, "it is a file", "give a folder")
    names = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    if names & {"config.json", "model_index.json"}:
        raise _spoils(
            folder,
            "a model is in it: Transformers would put the adapter into the model whenever that is loaded",
            "give a folder of its own",
        )
    other = next((name for kind, name in WEIGHTS.items() if kind != layout and name in names), None)
    if other is not None:
        raise _spoils(folder, f"it holds an adapter in another format, {other}", "give a folder of its own")


def write_folder(
    folder: Path,
    layout: Layout,
    config: Mapping[str, Any] | None,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    look: Callable[[Path], None],
) -> None:
    """Write the files, and have `look` see them, before they take the place of those that are there.

    A config is put there last and taken away first, so that a crash leaves a pair that belongs together, or weights
    that no reader takes for an adapter. The same values give the same bytes, where there is one entry of metadata.

    Raises what `look` raises, and `Error` (GP604) where the disk is full or the like: what was there is there then.
    """
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with locked(folder), workshop(folder / _WORKSHOP) as place:
                files = [place / WEIGHTS[layout]]
                save_file(copied_out(tensors), files[0], metadata=dict(metadata))
                if config is not None:
                    files.append(place / CONFIG)
                    files[1].write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
                look(place)
                for file in files:
                    file.chmod(0o666 & ~_umask())  # the library makes files that nobody else may read
                    sync(file)
                (folder / CONFIG).unlink(missing_ok=True)
                for file in files:
                    os.replace(file, folder / file.name)
                sync(folder)
        except BaseException:
            if made:
                with suppress(OSError):
                    folder.rmdir()
            raise
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or " ".join(str(error).split())[:300] or type(error).__name__
        raise Error(
            Diagnostic("GP604", f"the adapter cannot be written to {folder}", text=(why, "what was there before stays"))
        ) from None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _spoils(folder: Path, why: str, fix: str) -> Error:
    return Error(Diagnostic("GP636", f"an adapter cannot be written into {folder}", text=(why,), fixes=(fix,)))
