"""The two files of an adapter of PEFT, read and replaced. There is no third: pickled weights are not read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ...lang.diagnostics import Diagnostic, Error
from ..disk import locked, sync, workshop
from .config import CONFIG, PICKLE, TENSORS, unreadable

_WORKSHOP = ".adapter_model.partial"


def read_tensors(folder: str | PathLike[str]) -> dict[str, torch.Tensor]:
    """The tensors of an adapter, by PEFT's keys. Raises `Error` (GP621)."""
    path = Path(folder) / TENSORS
    try:
        return load_file(path)
    except FileNotFoundError:
        raise _absent(path) from None
    except OSError as error:
        raise unreadable(path, error.strerror or "the disk says no") from None
    except Exception as error:  # the library's own error, or torch's for a dtype it does not have
        raise unreadable(path, f"it is no safetensors file: {' '.join(str(error).split())[:200]}") from None


def _absent(path: Path) -> Error:
    why, fixes = f"{TENSORS} is missing", ("copy the adapter's folder anew",)
    if (path.parent / PICKLE).exists():
        why = f"{PICKLE} is there, a pickle, which can run any code when it is read; it is not"
        fixes = (
            f"where you trust it: safetensors.torch.save_file(torch.load({str(path.parent / PICKLE)!r}, "
            f"weights_only=True), {str(path)!r})",
        )
    return Error(Diagnostic("GP621", f"there are no weights to read in {path.parent}", text=(why,), fixes=fixes))


def write_files(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Replace both files, by two renames in a row. The same values give the same bytes.

    Raises `Error` (GP604) where the disk is full or the like; what was there before is there then.
    """
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder), workshop(folder / _WORKSHOP) as made:
            new_config, new_tensors, kept = made / CONFIG, made / TENSORS, made / "kept"
            new_config.write_text(text, encoding="utf-8", newline="\n")
            save_file(dict(tensors), new_tensors, metadata={"format": "pt"})
            new_tensors.chmod(new_config.stat().st_mode)  # the library makes files that nobody else may read
            for file in (new_config, new_tensors):
                sync(file)
            with suppress(OSError):  # there is none, or the disk has no links
                os.link(folder / TENSORS, kept)
            try:
                os.replace(new_tensors, folder / TENSORS)
                os.replace(new_config, folder / CONFIG)
            except BaseException:
                if kept.exists():
                    os.replace(kept, folder / TENSORS)
                raise
            sync(folder)
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or " ".join(str(error).split())[:300] or type(error).__name__
        raise Error(
            Diagnostic("GP604", f"the adapter cannot be written to {folder}", text=(why, "what was there before stays"))
        ) from None
