"""A safetensors file, written anew with some of its rows changed: what stays is copied, what changes is read, merged
and written a block of rows at a time. Names, order and shapes stay, so the header is the old one."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from math import prod
from pathlib import Path
from threading import RLock
from typing import BinaryIO

import torch
from torch import Tensor

from ...lang.diagnostics import Diagnostic, Error
from ...rewrites.merging import all_done, look_at_all, merge_blocks, not_finite, spans, working_dtype, workspace
from ..base_files import BaseFiles, Slot, read_into
from .pieces import Piece
from .updates import Updates

_CHUNK = 2**24


class Writer:
    """Writes the files of one base: several parts at a time, on as many threads as torch computes with."""

    def __init__(
        self,
        base: BaseFiles,
        updates: Updates,
        pieces: Mapping[str, Sequence[Piece]],
        done: Callable[[int], object],
        threads: int,
    ):
        """`done` gets the number of bytes that were written, by one thread at a time."""
        self.base, self.updates, self.pieces = base, updates, pieces
        self._done, self._threads, self._lock = done, threads, RLock()
        self._looked: set[str] = set()

    def write(self, file: Path, out: Path) -> None:
        """Write the new form of one of the base's files. Raises `Error` (GP647) for a NaN or an infinity."""
        regions = []
        for tensor, pieces in self.pieces.items():
            slot = self.base.slots[tensor]
            if slot.file == file:
                regions += [(slot.offset + p.file_row * _width(slot, p), slot, p) for p in pieces if p.rows]
        parts: list[Callable[[], None]] = []
        at, size = 0, file.stat().st_size
        for offset, slot, piece in sorted(regions, key=lambda region: region[0]):
            parts += self._copies(file, out, at, offset)
            parts.append(partial(self._change, slot, piece, offset, out))
            at = offset + piece.rows * _width(slot, piece)
        parts += self._copies(file, out, at, size)
        self._make(out, size, parts)

    def copy(self, file: Path, out: Path) -> None:
        """Any other file, as it is."""
        size = file.stat().st_size
        self._make(out, size, self._copies(file, out, 0, size))
        with suppress(OSError):
            os.chmod(out, file.stat().st_mode & 0o777)

    def _make(self, out: Path, size: int, parts: Sequence[Callable[[], None]]) -> None:
        with open(out, "xb") as target:
            target.truncate(size)
        all_done(parts, self._threads)

    def _copies(self, source: Path, target: Path, start: int, stop: int) -> list[Callable[[], None]]:
        return [partial(self._copy, source, target, at, min(at + _CHUNK, stop)) for at in range(start, stop, _CHUNK)]

    def _copy(self, source: Path, target: Path, start: int, stop: int) -> None:
        """Copied inside the kernel where it can be."""
        with open(source, "rb", buffering=0) as old, open(target, "r+b", buffering=0) as new:
            new.seek(start)
            while start < stop:
                sent = _send(old, new, start, stop - start)
                if not sent:
                    raise OSError(None, f"{source} is shorter than it was")
                start += sent
                self._count(sent)

    def _count(self, written: int) -> None:
        with self._lock:
            self._done(written)

    def _change(self, slot: Slot, piece: Piece, offset: int, out: Path) -> None:
        with open(out, "r+b", buffering=0) as target:
            if piece.name in self.updates.mergings:
                self._merge(slot, piece, target)
            else:
                value = self._value(piece, slot)[piece.row : piece.row + piece.rows]
                self._put((value.t() if piece.turned else value).contiguous(), offset, target)

    def _merge(self, slot: Slot, piece: Piece, target: BinaryIO) -> None:
        assert slot.dtype is not None
        mergings, width, dtype = self.updates.mergings[piece.name], _width(slot, piece), working_dtype(slot.dtype)
        if any(m.looks for m in mergings):
            self._look(piece.name)
        # What is turned is read and written as a whole: its rows lie nowhere in one piece.
        whole = self._rows(slot, piece, piece.row, piece.row + piece.rows).clone() if piece.turned else None

        def read(start: int, stop: int) -> Tensor:
            rows = workspace("rows", stop - start, piece.columns, dtype, torch.device("cpu"))
            if whole is not None:
                return rows.copy_(whole[start - piece.row : stop - piece.row])
            return rows.copy_(self._rows(slot, piece, start, stop))

        def write(start: int, rows: Tensor) -> None:
            assert slot.dtype is not None
            new = workspace("new", len(rows), piece.columns, slot.dtype, rows.device).copy_(rows)
            if not_finite(new):
                raise _infinite(piece.name, not_finite(self._rows(slot, piece, start, start + len(rows))))
            if whole is not None:
                whole[start - piece.row : start - piece.row + len(rows)] = new
                return
            self._put(new, slot.offset + (piece.file_row + start - piece.row) * width, target)

        merge_blocks(mergings, spans(mergings, piece.row, piece.row + piece.rows), read, write)
        if whole is not None:
            self._put(whole.t().contiguous(), slot.offset + piece.file_row * width, target)

    def _rows(self, slot: Slot, piece: Piece, start: int, stop: int) -> Tensor:
        """Rows of a parameter within a piece, as the base has them."""
        assert slot.dtype is not None
        if piece.name in self.updates.values:
            return self._value(piece, slot)[start:stop]
        width = _width(slot, piece)
        if piece.turned:
            there = torch.empty(piece.columns, piece.rows, dtype=slot.dtype)
            with open(slot.file, "rb", buffering=0) as file:
                read_into(file, _bytes(there), slot.offset + piece.file_row * width)
            return there.t()[start - piece.row : stop - piece.row].contiguous()
        read = workspace("read", stop - start, piece.columns, slot.dtype, torch.device("cpu"))
        with open(slot.file, "rb", buffering=0) as file:
            read_into(file, _bytes(read), slot.offset + (piece.file_row + start - piece.row) * width)
        return read

    def _value(self, piece: Piece, slot: Slot) -> Tensor:
        """A weight that trained with the adapter, as the file holds such."""
        return self.updates.values[piece.name].to(slot.dtype).reshape(-1, piece.columns or 1)

    def _look(self, name: str) -> None:
        """Show all rows of a parameter, wherever they are, to the updates that must see them first."""
        with self._lock:
            if name in self._looked:
                return
            mergings = self.updates.mergings[name]
            parts = sorted((p.row, t, p) for t, found in self.pieces.items() for p in found if p.name == name)
            for _, tensor, piece in parts:
                slot = self.base.slots[tensor]
                dtype = working_dtype(slot.dtype)  # type: ignore[arg-type]

                def read(start: int, stop: int, slot=slot, piece=piece, dtype=dtype) -> Tensor:  # type: ignore[no-untyped-def]
                    return self._rows(slot, piece, start, stop).to(dtype, copy=True)

                look_at_all(mergings, spans(mergings, piece.row, piece.row + piece.rows), read)
            self._looked.add(name)

    def _put(self, rows: Tensor, offset: int, target: BinaryIO) -> None:
        data = _bytes(rows)
        target.seek(offset)
        while len(data):
            written = target.write(data)
            self._count(written)
            data = data[written:]


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data


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
