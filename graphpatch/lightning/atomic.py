"""Checkpoints that are there as a whole or not at all."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from shutil import rmtree
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from ..lang.diagnostics import ApplyError, refusal

STRAY = ".tmp-"
"""Before the number of the process, in the name of what is half-written."""


class AtomicIO(TorchCheckpointIO):
    """Lightning's own file, written beside its place, synced, and renamed: a crash leaves the old one or the new one.

    Lightning writes to the system's temporary folder and moves the file; where that is another filesystem, moving is
    copying, and a crash leaves half of it. Paths that are no local files (`s3://`) are written as Lightning does.
    """

    def __init__(self, *companions: Callable[[Path], None], elsewhere: bool = False):
        """Each of `companions` is called with the path of a file that was written, to write something beside it;
        not if `elsewhere`, where the strategy calls them on all ranks."""
        super().__init__()
        self.companions, self.elsewhere = companions, elsewhere

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent)
        beside = path.with_name(f"{path.name}{STRAY}{os.getpid()}")
        try:
            with beside.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)
        for companion in () if self.elsewhere else self.companions:
            companion(path)

    def load_checkpoint(self, path: Any, *arguments: Any, **options: Any) -> Any:
        """Raises `ApplyError` (GP833) for a file that is torn, or no checkpoint."""
        with telling_what_is_torn(path):
            return super().load_checkpoint(path, *arguments, **options)

    def remove_checkpoint(self, path: Any) -> None:
        if "://" in str(path):
            super().remove_checkpoint(path)
            return
        remove(Path(path))
        if self.companions:
            rmtree(companion_of(Path(path)), ignore_errors=True)


def companion_of(path: Path) -> Path:
    """The directory beside a checkpoint: `last.adapter` beside `last.ckpt`."""
    return path.with_suffix(".adapter")


def sync_folder(folder: Path) -> None:
    """A rename is on disk when its folder is."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sweep(folder: Path) -> None:
    """Remove what processes that are gone have left half-written.

    A whole folder without which there would be none takes its place: its process was killed between two renames.
    """
    strays = [(stray, stray.name.rpartition(STRAY)[2]) for stray in folder.glob(f"*{STRAY}*")]
    gone = [stray for stray, number in strays if number.isdecimal() and not _alive(int(number))]
    for stray in sorted(gone, key=lambda path: ".old" in path.suffixes):
        place = stray.with_name(stray.name.rpartition(STRAY)[0].removesuffix(".old"))
        with suppress(OSError):
            if stray.is_dir() and _whole(stray) and not place.exists():
                os.replace(stray, place)
            remove(stray)


def remove(path: Path) -> None:
    """A folder loses first what says that it is whole."""
    if path.is_dir() and not path.is_symlink():
        (path / ".metadata").unlink(missing_ok=True)
        rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def last_whole(folder: str | os.PathLike[str]) -> Path | None:
    """The newest checkpoint in `folder` that is whole, None where there is none: what to resume from after a crash.

    A file is whole if every part of it can be read, a sharded one (a folder) if what is written last is there.
    """
    found = [path for path in Path(folder).rglob("*") if _is_checkpoint(path)]
    newest = sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True)
    return next((path for path in newest if _whole(path)), None)


@contextmanager
def telling_what_is_torn(path: Any) -> Iterator[None]:
    """Around the loading of a file: torch's errors say nothing of why it cannot be read."""
    try:
        yield
    except Exception:
        if "://" in str(path) or not Path(path).is_file() or _whole(Path(path)):
            raise
        raise torn(Path(path)) from None


def torn(path: Path) -> ApplyError:
    fix = "graphpatch.lightning.last_whole(folder) finds the newest that is"
    return refusal("GP833", f"{path} is no whole checkpoint", fix)


def _is_checkpoint(path: Path) -> bool:
    if path.is_dir():
        return is_sharded(path)
    return path.suffix in (".ckpt", ".pt", ".pth") and STRAY not in path.name and not is_sharded(path.parent)


def is_sharded(folder: Path) -> bool:
    return any(folder.glob("*.distcp"))


def _whole(path: Path) -> bool:
    try:
        if path.is_dir() and not (path / ".metadata").is_file():
            return False
        with zipfile.ZipFile(path / "meta.pt" if path.is_dir() else path) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False
