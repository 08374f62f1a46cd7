"""A safetensors file, written anew with some of its rows changed: what stays is copied, what changes is read, merged
and written a block of rows at a time. Names, order and shapes stay, so the header is the old one."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ...lang.diagnostics import Diagnostic, Error
from ...rewrites.merging import look_at_all, merge_blocks, not_finite, spans, working_dtype, workspace
from ..base_files import BaseFiles, Slot, read_into
from .pieces import Piece
from .updates import Updates

Done = Callable[[int], object]
"""Gets the number of bytes that were written."""
_CHUNK = 2**24


class Writer:
    """Writes the files of one base."""

    def __init__(self, base: BaseFiles, updates: Updates, pieces: Mapping[str, Sequence[Piece]], done: Done):
        self.base, self.updates, self.pieces, self.done = base, updates, pieces, done
        self._looked: set[str] = set()
        self._block = bytearray()

    def write(self, file: Path, out: Path) -> None:
        """Write the new form of one of the base's files. Raises `Error` (GP647) for a NaN or an infinity."""
        regions = []
        for tensor, pieces in self.pieces.items():
            slot = self.base.slots[tensor]
            if slot.file == file:
                regions += [(slot.offset + p.file_row * _width(slot, p), slot, p) for p in pieces if p.rows]
        with open(file, "rb", buffering=0) as source, open(out, "xb", buffering=0) as target:
            at = 0
            for offset, slot, piece in sorted(regions, key=lambda region: region[0]):
                self._copy(source, target, at, offset)
                self._change(slot, piece, offset, target)
                at = offset + piece.rows * _width(slot, piece)
            self._copy(source, target, at, os.fstat(source.fileno()).st_size)

    def copy(self, file: Path, out: Path) -> None:
        """Any other file, as it is."""
        with open(file, "rb", buffering=0) as source, open(out, "xb", buffering=0) as target:
            self._copy(source, target, 0, os.fstat(source.fileno()).st_size)
        with suppress(OSError):
            os.chmod(out, file.stat().st_mode & 0o777)

    def _copy(self, source: BinaryIO, target: BinaryIO, start: int, stop: int) -> None:
        """Copied inside the kernel where it can be."""
        target.seek(start)
        while start < stop:
            size = min(stop - start, _CHUNK)
            sent = _send(source, target, start, size)
            if not sent:
                raise OSError(None, f"{source.name} is shorter than it was")
            start += sent
            self.done(sent)

    def _change(self, slot: Slot, piece: Piece, offset: int, target: BinaryIO) -> None:
        if piece.name in self.updates.mergings:
            self._merge(slot, piece, target)
        else:
            value = self._value(piece, slot)[piece.row : piece.row + piece.rows]
            self._put(value.contiguous(), offset, target)

    def _merge(self, slot: Slot, piece: Piece, target: BinaryIO) -> None:
        assert slot.dtype is not None
        mergings, width = self.updates.mergings[piece.name], _width(slot, piece)
        if any(m.looks for m in mergings) and piece.name not in self._looked:
            self._look(piece.name)
        dtype = working_dtype(slot.dtype)
        where = spans(mergings, piece.row, piece.row + piece.rows)

        def read(start: int, stop: int) -> Tensor:
            rows = workspace("rows", stop - start, piece.columns, dtype, torch.device("cpu"))
            return rows.copy_(self._rows(slot, piece, start, stop))

        def write(start: int, rows: Tensor) -> None:
            assert slot.dtype is not None
            new = workspace("new", len(rows), piece.columns, slot.dtype, rows.device).copy_(rows)
            if not_finite(new):
                raise _infinite(piece.name, not_finite(self._rows(slot, piece, start, start + len(rows))))
            self._put(new, slot.offset + (piece.file_row + start - piece.row) * width, target)

        merge_blocks(mergings, where, read, write)

    def _rows(self, slot: Slot, piece: Piece, start: int, stop: int) -> Tensor:
        """Rows of a parameter within a piece, as the base has them."""
        assert slot.dtype is not None
        if piece.name in self.updates.values:
            return self._value(piece, slot)[start:stop]
        width = _width(slot, piece)
        size = (stop - start) * width
        if len(self._block) < size:
            self._block = bytearray(size)
        with open(slot.file, "rb", buffering=0) as file:
            read_into(file, memoryview(self._block)[:size], slot.offset + (piece.file_row + start - piece.row) * width)
        if not size:
            return torch.empty(stop - start, piece.columns, dtype=slot.dtype)
        return torch.frombuffer(self._block, dtype=slot.dtype, count=size // slot.dtype.itemsize).view(
            -1, piece.columns
        )

    def _value(self, piece: Piece, slot: Slot) -> Tensor:
        """A weight that trained with the adapter, as the file holds such."""
        return self.updates.values[piece.name].to(slot.dtype).reshape(-1, piece.columns or 1)

    def _look(self, name: str) -> None:
        """Show all rows of a parameter, wherever they are, to the updates that must see them first."""
        self._looked.add(name)
        parts = sorted((p.row, t, p) for t, found in self.pieces.items() for p in found if p.name == name)
        for _, tensor, piece in parts:
            slot = self.base.slots[tensor]
            dtype = working_dtype(slot.dtype)  # type: ignore[arg-type]
            where = spans(self.updates.mergings[name], piece.row, piece.row + piece.rows)

            def read(start: int, stop: int, slot=slot, piece=piece, dtype=dtype) -> Tensor:  # type: ignore[no-untyped-def]
                return self._rows(slot, piece, start, stop).to(dtype, copy=True)

            look_at_all(self.updates.mergings[name], where, read)

    def _put(self, rows: Tensor, offset: int, target: BinaryIO) -> None:
        data = rows.view(-1).view(torch.uint8).numpy().data
        target.seek(offset)
        while len(data):
            written = target.write(data)
            self.done(written)
            data = data[written:]


def _width(slot: Slot, piece: Piece) -> int:
    """Of a row, in bytes."""
    size = prod(slot.shape)
    return piece.columns * (slot.nbytes // size if size else 0)


def _send(source: BinaryIO, target: BinaryIO, offset: int, size: int) -> int:
    if hasattr(os, "sendfile"):
        with suppress(OSError):  # between some file systems it cannot; if the disk is full, writing says so too
            return os.sendfile(target.fileno(), source.fileno(), offset, size)
    source.seek(offset)
    data = source.read(min(size, 2**20))
    target.seek(offset)
    return target.write(data)


def _infinite(name: str, before: bool) -> Error:
    why = "the base has such a value already" if before else "the update does not fit its dtype"
    fix = "look at the adapter's tensors" if not before else "fetch the base anew"
    return Error(Diagnostic("GP647", f"merged, `{name}` would hold a NaN or an infinity: {why}", fixes=(fix,)))
