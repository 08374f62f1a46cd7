"""The safetensors files of a base: what is in them, and where.

The format (safetensors' README, "Format"): 8 bytes little-endian length N, N bytes of JSON with the dtype, shape and
`data_offsets` of each tensor, then the data. A directory may hold several, listed by `model.safetensors.index.json`.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch
from safetensors import safe_open

from ..lang.diagnostics import Diagnostic, Error

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip


class Slot(NamedTuple):
    """Where a tensor's bytes are."""

    file: Path
    offset: int
    """From the start of the file."""
    nbytes: int
    dtype: torch.dtype | None
    """None for those that cannot be computed with here (float8, packed ones)."""
    shape: tuple[int, ...]
    written: str
    """The dtype as the file writes it."""


@dataclass
class BaseFiles:
    """A checkpoint in safetensors."""

    folder: Path
    """Or the file, where a single one was named."""
    files: list[Path]
    slots: Mapping[str, Slot] = field(default_factory=dict)

    @classmethod
    def open(cls, source: str | os.PathLike[str]) -> BaseFiles:
        """Reads headers alone. Raises `Error` (GP641) where there are no safetensors files, or damaged ones."""
        folder = Path(source)
        files = list(_files(folder))
        slots: dict[str, Slot] = {}
        for file in files:
            for name, slot in _slots(file):
                if name in slots:
                    _fail(f"{file} holds `{name[:200]}`, and so does {slots[name].file.name}")
                slots[name] = slot
        return cls(folder, files, slots)

    @property
    def beside(self) -> Path:
        """The directory that the files are in."""
        return self.folder if self.folder.is_dir() else self.folder.parent

    def read(self, name: str) -> torch.Tensor:
        """A tensor, in memory of its own."""
        slot = self.slots[name]
        assert slot.dtype is not None
        data = bytearray(slot.nbytes)
        with open(slot.file, "rb", buffering=0) as file:
            read_into(file, memoryview(data), slot.offset)
        if not data:
            return torch.empty(slot.shape, dtype=slot.dtype)
        return torch.frombuffer(data, dtype=slot.dtype).view(slot.shape)

    def read_part(self, name: str, dim: int, start: int, stop: int) -> torch.Tensor:
        """Of a tensor, rows `start` to `stop` (`dim` 0) or columns (`dim` 1 of a matrix), and nothing else."""
        slot = self.slots[name]
        assert slot.dtype is not None
        rows, row = slot.shape[0], slot.nbytes // max(slot.shape[0], 1)
        if dim == 0:
            shape, pieces = (stop - start, *slot.shape[1:]), [(start * row, (stop - start) * row)]
        else:
            _, columns = slot.shape
            width = row // columns
            shape, pieces = (
                (rows, stop - start),
                [(at * row + start * width, (stop - start) * width) for at in range(rows)],
            )
        data = bytearray(sum(length for _, length in pieces))
        at, whole = 0, memoryview(data)
        with open(slot.file, "rb", buffering=0) as file:
            for offset, length in pieces:
                read_into(file, whole[at : at + length], slot.offset + offset)
                at += length
        return torch.frombuffer(data, dtype=slot.dtype).view(shape) if data else torch.empty(shape, dtype=slot.dtype)


def read_into(file: io.FileIO, block: memoryview, offset: int) -> None:
    """Fill `block` from an unbuffered file, at an offset. Raises `OSError` where the file is shorter."""
    file.seek(offset)
    while len(block):
        got = file.readinto(block)
        if not got:
            raise OSError("the file is shorter than its header says")
        block = block[got:]


def _files(folder: Path) -> Iterator[Path]:
    if folder.is_file() and folder.suffix == ".safetensors":
        yield folder
        return
    if folder.is_file() and folder.name.endswith(".safetensors.index.json"):
        folder, index = folder.parent, folder
    else:
        index = folder / INDEX
    if index.exists():
        yield from _listed(index)
        return
    if not folder.is_dir():
        _fail(f"{folder} is no directory and no safetensors file", "name the directory that holds the base's weights")
    found = sorted(folder.glob("*.safetensors"))
    if (folder / SINGLE) in found:
        # As transformers has it; others beside it hold the same weights in another form.
        found = [folder / SINGLE]
    if not found:
        others = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf") for p in folder.glob(pattern))
        has = f"it has {', '.join(others[:3])}: " if others else ""
        fix = f"{has}save it as safetensors first: model.save_pretrained(DIR, safe_serialization=True)"
        _fail(f"{folder} holds no safetensors files", fix)
    yield from found


def _listed(index: Path) -> Iterator[Path]:
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except OSError as error:
        _fail(f"{index} cannot be read: {error.strerror or error}")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        _fail(f"{index} is no index of safetensors files: it has no `weight_map` of names to files")
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            _fail(f"{index} names `{str(name)[:200]}`, which is no file beside it")
        if not (index.parent / name).is_file():
            _fail(f"{index} names {name}, which is not there", "fetch what is missing of the base")
        yield index.parent / name


def _slots(path: Path) -> Iterator[tuple[str, Slot]]:
    try:
        # The library checks all there is to check: lengths, overlaps, gaps, what each tensor needs.
        with safe_open(path, "pt") as _:
            pass
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except OSError as error:
        _fail(f"{path} cannot be read: {error.strerror or error}")
    except Exception as error:
        why = " ".join(str(error).split())[:200]
        _fail(f"{path} is no safetensors file, or cut off: {why}", "fetch or save that file anew")
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            dtype = _DTYPES.get(entry["dtype"])
            yield name, Slot(path, 8 + length + begin, end - begin, dtype, tuple(entry["shape"]), entry["dtype"])


def _fail(title: str, *fixes: str) -> NoReturn:
    raise Error(Diagnostic("GP641", title, fixes=fixes)) from None
