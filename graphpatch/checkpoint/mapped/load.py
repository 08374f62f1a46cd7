"""The weights of another family's checkpoint into a model that rules made of this one, and back into its files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor

from ...lang.diagnostics import Diagnostic, Error
from ...patch.original import original_rules
from ...patch.over_ranks import parts, refuse_parts
from ...patch.patch import Patch
from ...plan.maps import Piece, restored, translated
from ...plan.rules import maps_in_force
from ...plan.scope import World
from ..base_files import SINGLE, BaseFiles
from ..disk import locked, sync, workshop
from ..tensors import copied_out, journal_of
from .layouts import changed
from .materialise import Places, fill_unsaved
from .parts import Source, read_for
from .slots import Slot, held_by, slots_of


def source_of(source: str | PathLike[str] | Mapping[str, Any]) -> Source:
    """A directory, a file or a state dict, to read from. Raises `Error` (GP641, GP662) for what is none."""
    if isinstance(source, Mapping):
        wrong = next((k for k, v in source.items() if not isinstance(v, Tensor)), None)
        if wrong is not None:
            title = f"`{wrong}` is no tensor, but {type(source[wrong]).__name__}"
            raise Error(Diagnostic("GP662", title, fixes=("give the state dict itself: {name: tensor}",)))
        shapes = {name: tuple(value.shape) for name, value in source.items()}

        def stretch(name: str, dim: int, start: int, stop: int) -> Tensor:
            return cast(Tensor, source[name]).narrow(dim, start, stop - start)

        return Source("the state dict", shapes, source.__getitem__, stretch)
    files = BaseFiles.open(source)
    return Source(str(source), {name: slot.shape for name, slot in files.slots.items()}, files.read, files.read_part)


def load_base(patch: Patch | Sequence[Patch], source: str | PathLike[str] | Mapping[str, Any]) -> None:
    """Put a checkpoint's weights into the patched model, by the maps of the patch's rules: all that there are.

    A tied weight is there under any of its names; buffers that the model does not save are none of it. A model on the
    meta device gets memory where the values are.

    Raises `Error`, and nothing has changed: GP641 for files that cannot be read, GP660 for layouts, GP661 for missing
    and unexpected keys, GP662 for shapes, GP664 for two values of a tied weight, GP616 for a model on the meta device
    that a checkpoint alone cannot fill; GP663 where reading failed half-way.
    """
    patches = parts(patch)
    for one in patches:
        journal_of(one)
    models = [one.model for one in patches]
    given = source_of(source)
    targets = slots_of(models)
    world = world_of(patches[0])
    pieces, idle = translated(world, given.shapes)
    _check_names(pieces, targets, given.name, idle)
    _check_shapes(pieces, targets, given)
    _check_tied(pieces, targets, given)
    here = [slot.tensor for slot in targets.values() if slot.tensor is not None]
    places = None
    if any(tensor.is_meta for tensor in here):
        fill_unsaved(models, here)
        places = Places(models)
    done = 0
    try:
        with torch.inference_mode(False), torch.no_grad():
            for piece in pieces:
                if all(targets[key].tensor is None for key in piece.targets):
                    continue
                for key, value in zip(piece.targets, read_for(piece, targets, given)):
                    slot = targets[key]
                    if slot.tensor is not None and slot.tensor.is_meta and places is not None:
                        places.put(slot.tensor, value)
                    elif slot.tensor is not None:
                        slot.tensor.copy_(value)
                    done += slot.tensor is not None
    except (OSError, RuntimeError) as error:
        why = " ".join(str(error).split())[:200]
        title = f"reading {given.name} failed after {done} weights: the model holds some of them"
        raise Error(Diagnostic("GP663", title, text=(why,), fixes=("load again before the model is used",))) from error


def save_weights(patch: Patch, directory: str | PathLike[str]) -> None:
    """Write the patched model's weights to `directory`, `model.safetensors`, under the names and in the layouts of the
    family that the rules' maps read: the way back of `load_weights`. Its `config.json` is yours to add.

    Of tied weights the first is written. Raises `Error`: GP474 and GP660 where a map has no way back, GP605 for a model
    without values, GP953 where this process has a part of the model.
    """
    journal_of(patch)
    refuse_parts(patch.model, "model.safetensors is")
    held = held_by(patch.model)
    first: dict[int, str] = {}
    once = {key: tensor for key, tensor in held.items() if first.setdefault(id(tensor), key) == key}
    made: dict[str, Tensor] = {}
    for piece in restored(world_of(patch), {key: tuple(tensor.shape) for key, tensor in once.items()}):
        made |= dict(zip(piece.targets, changed(piece, [once[key].detach() for key in piece.sources], back=True)))
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = copied_out(made)
    with locked(folder), workshop(folder / ".graphpatch.tmp") as half_done:
        save_file(tensors, half_done / SINGLE, metadata={"format": "pt"})
        sync(half_done / SINGLE)
        (half_done / SINGLE).replace(folder / SINGLE)
    sync(folder)


def maps_of(patch: Patch) -> bool:
    """Whether the patch's rules have maps in force."""
    return bool(maps_in_force(world_of(patch)))


def world_of(patch: Patch) -> World:
    rules, tree = original_rules(patch)
    return World(rules.program, tree)


def _check_names(pieces: list[Piece], targets: Mapping[str, Slot], name: str, idle: list[str]) -> None:
    made = {key for piece in pieces for key in piece.targets}
    there = {targets[key].key for key in made if key in targets}
    missing = [key for key, slot in targets.items() if key not in made and slot.key not in there]
    unexpected = sorted(made - targets.keys())
    if missing or unexpected:
        sources = {key: piece.sources for piece in pieces for key in piece.targets}
        lines = [f"- {key}   missing" for key in missing[:8]]
        lines += [f"+ {key}   unexpected" + _from(key, sources[key]) for key in unexpected[:8]]
        more = max(0, len(missing) - 8) + max(0, len(unexpected) - 8)
        raise Error(
            Diagnostic(
                "GP661",
                f"{name} has {len(missing)} weights too few and {len(unexpected)} too many for this model",
                text=(*lines, *([f"and {more} more"] if more else []), *(f"fits no key: {text}" for text in idle[:4])),
                fixes=("`map KEY -> KEY` in the rules says what a key is here, `map KEY -> none` leaves one behind",),
            )
        )


def _from(key: str, sources: tuple[str, ...]) -> str:
    return "" if sources == (key,) else f" (from {sources[0]})"


def _check_tied(pieces: list[Piece], targets: Mapping[str, Slot], given: Source) -> None:
    """A weight that is one here may have two names in a checkpoint, but not two values."""
    makers: dict[object, dict[str, Piece]] = {}
    for piece in pieces:
        for key in piece.targets:
            makers.setdefault(targets[key].key, {})[key] = piece

    def value(key: str, piece: Piece) -> Tensor:
        return changed(piece, [given.read(source) for source in piece.sources])[piece.targets.index(key)]

    for named in makers.values():
        (first, piece), *others = named.items()
        for key, other in others:
            if not torch.equal(value(first, piece).cpu(), value(key, other).cpu()):
                title = f"`{first}` and `{key}` are one weight in this model, and {given.name} has two values for it"
                raise Error(
                    Diagnostic("GP664", title, fixes=("untie them in the model, or leave one: `map KEY -> none`",))
                )


def _check_shapes(pieces: list[Piece], targets: Mapping[str, Slot], given: Source) -> None:
    wrong = []
    for piece in pieces:
        empty = [torch.empty(given.shapes[key], device="meta") for key in piece.sources]
        for key, value in zip(piece.targets, changed(piece, empty)):
            if tuple(value.shape) != targets[key].shape:
                wrong.append(f"{key}: {list(value.shape)}, and the model has {list(targets[key].shape)}")
    if wrong:
        more = (f"and {len(wrong) - 8} more",) if len(wrong) > 8 else ()
        title = f"{len(wrong)} weights of {given.name} have another shape than the model's"
        raise Error(Diagnostic("GP662", title, text=(*wrong[:8], *more)))
