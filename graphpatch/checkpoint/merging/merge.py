"""`merge_checkpoint`: a base and an adapter in, a checkpoint out."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any

from ...lang.diagnostics import Diagnostic, Error
from ...rewrites.merging import exact_arithmetic, one_thread_each
from ...tree.collection import no_collection
from ...tree.tree import Tree
from ..base_files import INDEX, BaseFiles
from ..hf_model import meta_model, model_type
from ..pair import JSON
from ..peft.config import CONFIG
from .folder import made_whole
from .pieces import find_pieces
from .updates import Updates, planned_updates, updates_of
from .write import Writer

_OTHER_WEIGHTS = (
    "*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model*.bin.index.json", "*.pth",
    "*.gguf", "tf_model*.h5", "flax_model*.msgpack", "rust_model.ot", "*.onnx", "*.onnx_data",
)  # fmt: skip
"""The base's weights in other forms: without the adapter, and so not to lie beside those that have it."""
Progress = Callable[[int, int], Any]


def merge_checkpoint(
    base: str | PathLike[str],
    adapter: str | PathLike[str],
    out: str | PathLike[str],
    *,
    sync: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write to `out` the checkpoint in `base` with the adapter in `adapter` merged into its weights.

    `base` is a directory of safetensors (one file, or several with an index; other files are copied, the same weights
    in other forms left out), or a single such file, which `out` is then too. `adapter` is what `save_adapter` wrote, or
    an adapter of PEFT. Each weight becomes W + s B A, worked out in float32 and rounded once, bit for bit what
    `patch.merge()` makes of it; weights that trained with the adapter take the place of the base's. No more than a
    block of rows is held in memory beside the adapter. Nothing stands under the name `out` before all is written: a run
    that fails or is killed leaves nothing there. `sync` waits until the disk has it, as after a loss of power only then
    it surely does, and which takes longer than all the rest. `progress` gets the bytes written so far, and of how many.

    Raises `Error`, and leaves nothing behind: GP601 to GP603, GP613 where the adapter cannot be read (one of PEFT:
    GP621 to GP628), GP641 to GP643 where the base cannot, or is another than the adapter was made on, GP644 for ops
    that are no change of weights, GP645 where transformers is needed to translate names, GP646 where `out` is there or
    cannot be written, GP647 where a weight would hold a NaN or an infinity.
    """
    files, target = BaseFiles.open(base), Path(out)
    folder = files.folder if files.folder.is_dir() else None
    if folder is None and target.suffix != ".safetensors":
        fix = f"name it {target}.safetensors, or give the directory as the base"
        raise Error(Diagnostic("GP646", f"{files.folder} is a single file, and {target} no name of one", fixes=(fix,)))
    with no_collection():
        updates = _updates(adapter, files)
        pieces = find_pieces(updates, files)
    with made_whole(target, sync) as unseen, exact_arithmetic("cpu"), one_thread_each() as threads:
        others = [] if folder is None else list(_others(folder, {*files.files}, skip=(target, unseen)))
        total = sum(file.stat().st_size for file in (*files.files, *others))
        _refuse_full(unseen.parent, total)
        written = 0

        def done(count: int) -> None:
            nonlocal written
            written += count
            if progress is not None:
                progress(written, total)

        writer = Writer(files, updates, pieces, done, threads)
        if folder is None:
            writer.write(files.files[0], unseen)
            return
        unseen.mkdir()
        for file in others:
            copy = unseen / file.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            writer.copy(file, copy)
        for file in files.files:
            writer.write(file, unseen / file.name)


def _updates(adapter: str | PathLike[str], files: BaseFiles) -> Updates:
    folder = Path(adapter)
    if (folder / CONFIG).is_file() and not (folder / JSON).is_file():
        return _updates_of_peft(folder, files)
    return updates_of(folder)


def _updates_of_peft(folder: Path, files: BaseFiles) -> Updates:
    """Such an adapter says which modules it changes and not of what kind they are: the model has to be known."""
    base = files.beside
    if model_type(base) is None:
        title = (
            f"{folder} is an adapter of PEFT, and {base} has no config.json of transformers that says of which model"
        )
        fix = "load the model, then graphpatch.load_peft(model, DIR).bake(), and save it"
        raise Error(Diagnostic("GP645", title, fixes=(fix,)))
    from ..peft.load import planned  # of what only these adapters need

    tree = Tree.of(meta_model(base, "which model an adapter of PEFT changes is said by its config.json"))
    plan, added, values = planned(folder, tree)
    updates = planned_updates(str(folder), plan, added)
    updates.values = values
    return updates


def _others(folder: Path, weights: set[Path], skip: tuple[Path, ...]) -> Iterator[Path]:
    """What lies beside the weights, hidden folders apart. The index of those files is among it."""
    avoided = {path.resolve() for path in (*skip, skip[1].parent)}
    for above, folders, names in os.walk(folder):
        folders[:] = [f for f in folders if not f.startswith(".") and (Path(above) / f).resolve() not in avoided]
        for name in sorted(names):
            file = Path(above) / name
            mine = name == INDEX and Path(above) == folder
            if file in weights or not file.is_file():
                continue
            if mine or not any(file.match(pattern) for pattern in _OTHER_WEIGHTS):
                yield file


def _refuse_full(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        title = f"{folder.parent} has {free / 2**30:.1f} GiB left, and {needed / 2**30:.1f} GiB are needed"
        raise Error(Diagnostic("GP646", title, fixes=("make room, or name a place on another disk",)))
