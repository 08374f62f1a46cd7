"""A file or folder that is made out of sight, and takes its name when it is whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...lang.diagnostics import Diagnostic, Error
from ..disk import sync


@contextmanager
def made_whole(out: Path, synced: bool) -> Iterator[Path]:
    """A path beside `out`, in a folder of its own, to make it at; on leaving, that is renamed to `out`.

    Whatever goes wrong inside leaves nothing; what a killed run left is cleared away by the next of the same name.
    `synced` has everything on the disk first, which a loss of power would else be free to lose in any order. Raises
    `Error` (GP646) where `out` is there already, or the disk is full or refuses.
    """
    if os.path.lexists(out):
        fix = "name one that does not exist, or remove it first: nothing is overwritten"
        raise Error(Diagnostic("GP646", f"{out} is there already", fixes=(fix,)))
    workshop = out.parent / f".{out.name}.partial"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        workshop.mkdir(exist_ok=True)
        with _alone(workshop, out):
            try:
                _clear(workshop)
                yield workshop / out.name
                for path in (*workshop.rglob("*"), workshop) if synced else ():
                    sync(path)
                if os.path.lexists(out):
                    raise FileExistsError(None, "it has come into being meanwhile")
                os.rename(workshop / out.name, out)
                if synced:
                    sync(out.parent)
            finally:
                shutil.rmtree(workshop, ignore_errors=True)
    except OSError as error:
        why = error.strerror or " ".join(str(error).split())[:200] or type(error).__name__
        text = (why, "what was written is removed again")
        raise Error(Diagnostic("GP646", f"{out} cannot be written", text=text)) from None


def _clear(folder: Path) -> None:
    for entry in folder.iterdir():
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


@contextmanager
def _alone(workshop: Path, out: Path) -> Iterator[None]:
    """One writer at a time, where the system has locks; a killed one's is released."""
    try:
        from fcntl import LOCK_EX, LOCK_NB, flock
    except ImportError:
        yield
        return
    number = os.open(workshop, os.O_RDONLY)
    try:
        try:
            flock(number, LOCK_EX | LOCK_NB)
        except BlockingIOError:
            fix = "wait for it, or name another"
            raise Error(Diagnostic("GP646", f"another run is writing {out}", fixes=(fix,))) from None
        except OSError:  # some network file systems have no locks
            pass
        yield
    finally:
        os.close(number)
