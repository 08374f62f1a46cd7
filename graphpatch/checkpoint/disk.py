"""What a folder needs in which files are replaced: a place for what is half done, one writer at a time, and the disk's
word that it has what it was given."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from shutil import rmtree


@contextmanager
def workshop(path: Path) -> Iterator[Path]:
    """An empty folder for what is half done, on the same disk; a killed save's is cleared away by the next."""
    rmtree(path, ignore_errors=True)
    path.mkdir()
    try:
        yield path
    finally:
        rmtree(path, ignore_errors=True)


def sync(path: Path) -> None:
    """Have a file's content, or a folder's names, on the disk before anything later."""
    if os.name == "nt" and path.is_dir():
        return
    number = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One writer at a time (all ranks of a job may save), where the system has locks; a killed one's is released."""
    try:
        from fcntl import LOCK_EX, flock
    except ImportError:
        yield
        return
    number = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems have none
            flock(number, LOCK_EX)
        yield
    finally:
        os.close(number)
