"""The two files of an adapter, and how they are replaced: at any moment, a crash leaves the old pair or the new one.

`adapter.json` holds the hash of the tensors that belong to it. New tensors are put beside the old, under a name made of
their hash; renaming the new `adapter.json` over the old is the moment from which the new pair counts; then the
tensors take their lasting name, `adapter.safetensors`. A reader looks under both names for the hash.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..lang.diagnostics import Diagnostic, Error
from .disk import locked, sync, workshop
from .manifest import Manifest

JSON, TENSORS = "adapter.json", "adapter.safetensors"
_WORKSHOP = ".adapter.partial"
_PENDING = re.compile(r"adapter-[0-9a-f]{16}\.safetensors")
_LARGEST = 256 * 2**20
"""Of `adapter.json`, in bytes: that of a model of 75,000 modules no two of which are alike has a tenth."""


class Pair(NamedTuple):
    manifest: Manifest
    tensors: dict[str, torch.Tensor]


# ── writing ──


def write_pair(folder: Path, tensors: Mapping[str, torch.Tensor], manifest: Callable[[str], Manifest]) -> None:
    """Replace the pair in `folder`, which is made where it does not exist. `manifest` gets the tensors' hash.

    Raises `Error` (GP604) where the disk is full or the like; the old pair is still there then.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            _replace(folder, tensors, manifest)
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or " ".join(str(error).split())[:300] or type(error).__name__
        raise Error(
            Diagnostic("GP604", f"the adapter cannot be written to {folder}", text=(why, "what was there before stays"))
        ) from None


def _replace(folder: Path, tensors: Mapping[str, torch.Tensor], manifest: Callable[[str], Manifest]) -> None:
    with workshop(folder / _WORKSHOP) as made:
        new_tensors, new_json = made / TENSORS, made / JSON
        new_json.touch()
        # One entry of metadata: the library writes several in an order that changes from run to run.
        save_file(dict(tensors), new_tensors, metadata={"format": "pt"})
        new_tensors.chmod(new_json.stat().st_mode)  # the library makes files that nobody else may read
        sync(new_tensors)
        digest = _digest(new_tensors)
        new_json.write_text(manifest(digest).to_json(), encoding="utf-8", newline="\n")
        sync(new_json)
        pending = _pending(folder, digest)
        known = pending.exists()  # a save of the same bytes was killed, and its json may count already
        os.replace(new_tensors, pending)
        try:
            sync(folder)
            os.replace(new_json, folder / JSON)
        except BaseException:
            if not known:
                pending.unlink(missing_ok=True)
            raise
    sync(folder)
    os.replace(pending, folder / TENSORS)
    sync(folder)
    for file in folder.iterdir():  # what earlier saves left, killed between the two renames
        if _PENDING.fullmatch(file.name):
            file.unlink(missing_ok=True)


def _pending(folder: Path, digest: str) -> Path:
    return folder / f"adapter-{digest[:16]}.safetensors"


# ── reading ──


def read_pair(folder: Path) -> Pair:
    """The pair in `folder`, all of it in memory.

    Raises `Error`: GP601 there is none, GP602 the json is none of ours, GP603 the tensors are missing or damaged.
    """
    while True:
        text = _read_json(folder)
        manifest = Manifest.from_json(text, folder / JSON)
        for file in (_pending(folder, manifest.tensors.sha256), folder / TENSORS):
            tensors = _read_tensors(file, manifest.tensors.sha256)
            if tensors is not None:
                return Pair(manifest, tensors)
        if _read_json(folder) == text:
            break
        # Replaced while it was read: once more.
    if not (folder / TENSORS).exists():
        raise _damaged(f"{folder / TENSORS} is missing")
    raise _damaged(f"{folder / TENSORS} is not the file that {JSON} was written with: cut off, or changed since")


def _read_json(folder: Path) -> bytes:
    path = folder / JSON
    try:
        with open(path, "rb") as file:
            text = file.read(_LARGEST + 1)
    except OSError as error:
        raise _absent(folder, error) from None
    if len(text) > _LARGEST:
        raise Error(Diagnostic("GP602", f"{path} is no adapter that can be read", text=("it is far too large",)))
    return text


def _absent(folder: Path, error: OSError) -> Error:
    fixes: tuple[str, ...] = ("graphpatch.save_adapter(patch, folder) writes one",)
    if folder.is_file():
        fixes = ("an adapter is a folder: give that which holds the file",)
    elif (folder / "adapter_config.json").exists():
        fixes = ("adapter_config.json is there: this is an adapter in PEFT's format",)
    return Error(
        Diagnostic(
            "GP601", f"there is no adapter in {folder}", text=(f"{JSON}: {error.strerror or error}",), fixes=fixes
        )
    )


def _read_tensors(path: Path, digest: str) -> dict[str, torch.Tensor] | None:
    """The tensors of a file that has this hash; None where it has not, is not there, or is replaced meanwhile."""
    try:
        before = os.stat(path)
        if _digest(path) != digest:
            return None
        tensors = load_file(path)
        after = os.stat(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _damaged(f"{path} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # the library's own error, or torch's for a dtype it does not have
        raise _damaged(f"{path} is no safetensors file: {' '.join(str(error).split())[:200]}") from None
    same = (before.st_ino, before.st_size, before.st_mtime_ns) == (after.st_ino, after.st_size, after.st_mtime_ns)
    return tensors if same else None


def _digest(path: Path) -> str:
    found, block = sha256(), memoryview(bytearray(2**20))
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(block):
            found.update(block[:size])
    return found.hexdigest()


def _damaged(why: str) -> Error:
    return Error(
        Diagnostic("GP603", "the tensors of this adapter cannot be read", text=(why,), fixes=("copy the folder anew",))
    )
