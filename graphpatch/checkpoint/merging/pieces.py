"""Where a model's parameters lie in the files of a checkpoint."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from math import prod
from typing import NamedTuple

from torch import Tensor

from ...lang.diagnostics import Diagnostic, Error
from ..base_files import BaseFiles, Slot
from ..base_weights import find_names, refuse_missing, refuse_packed, refuse_shapes
from ..hf_model import never_saved
from .converted import Place, Turned, converted_places
from .updates import Shape, Updates


class Piece(NamedTuple):
    """Rows of a parameter that lie together in a tensor of a file."""

    name: str
    """The parameter's."""
    file_row: int
    row: int
    """In the parameter."""
    rows: int
    columns: int
    turned: bool = False
    """Whether the file has these rows as columns."""


def find_pieces(updates: Updates, files: BaseFiles) -> dict[str, list[Piece]]:
    """What of each tensor in the files changes, by the tensor's name there.

    The base is held against the model that the adapter was made on, name by name and shape by shape. Raises `Error`:
    GP642 for names, GP643 for shapes and quantised weights, GP645 where names are transformers' to translate and it
    cannot.
    """
    slots, what = files.slots, files.folder.name
    shapes = {**updates.shapes, **{name: tuple(value.shape) for name, value in updates.values.items()}}
    located = locate({name: updates.names.get(name, (name,)) for name in shapes}, shapes, updates.mergings, files)
    pieces: dict[str, list[Piece]] = {}
    for name in dict.fromkeys([*updates.values, *updates.mergings]):
        for place in located[name]:
            for tensor, piece in _pieces(name, place, updates):
                pieces.setdefault(tensor, []).append(piece)
    merged = [(t, slots[t].written) for t, found_ in pieces.items() if any(p.name in updates.mergings for p in found_)]
    refuse_packed([(t, written) for t, written in merged if not _adds(slots[t])], what)
    for tensor, found_ in pieces.items():
        for piece in found_:
            _refuse_type(piece.name, updates.values.get(piece.name), slots[tensor])
    return pieces


def locate(
    aliases: Mapping[str, Iterable[str]], shapes: Mapping[str, Shape], changed: Collection[str], files: BaseFiles
) -> dict[str, list[Place]]:
    """Every place of each parameter: files may hold a tied one, which has several names, twice. `changed` are those
    that matter in content. Raises `Error`: GP642 for names, GP643 for shapes, GP645 from `converted_places`."""
    places: Mapping[str, Place] = {name: Place(slot.shape, name) for name, slot in files.slots.items()}
    found = _found(aliases, places)
    differs = any(places[key].shape != shapes[name] for name, there in found.items() for key in there)
    # Stacks of experts are kept either way round, under the same name.
    stacks = any(len(shapes[name]) == 3 for name in changed)
    if differs or stacks or not all(found.values()):
        translated = converted_places(files)
        if translated is not None:
            again = _found(aliases, translated)
            if sum(map(bool, again.values())) >= sum(map(bool, found.values())):
                places, found = translated, again
    missing = [name for name, there in found.items() if not there]
    if missing and not set(missing) & set(changed):
        missing = [name for name in missing if name not in never_saved(files.beside, missing)]
    refuse_missing(missing, places, files.folder.name)
    refuse_shapes([(n, places[k].shape, shapes[n]) for n, there in found.items() for k in there], files.folder.name)
    return {name: [places[key] for key in there] for name, there in found.items()}


def _found(aliases: Mapping[str, Iterable[str]], places: Mapping[str, Place]) -> dict[str, list[str]]:
    """For each parameter, all names under which it is there."""
    names = find_names([alias for names in aliases.values() for alias in names], places)
    return {name: list(dict.fromkeys(names[a] for a in all_ if a in names)) for name, all_ in aliases.items()}


def _pieces(name: str, place: Place, updates: Updates) -> Iterable[tuple[str, Piece]]:
    if isinstance(place.where, str):
        mergings = updates.mergings.get(name)
        columns = mergings[0].columns if mergings else place.columns
        size = prod(place.shape)
        yield place.where, Piece(name, 0, 0, size // columns if columns else 0, columns)
    elif isinstance(place.where, Turned):
        mergings = updates.mergings.get(name)
        *_, rows, columns = place.shape
        if mergings and mergings[0].columns != columns:
            raise unknown_layout(name)
        for row in range(0, prod(place.shape[:-1]), rows):  # one matrix after the other
            yield place.where.name, Piece(name, row, row, rows, columns, turned=True)
    elif place.where is None:
        raise unknown_layout(name)
    else:
        for tensor, file_row, row, rows in place.where:
            yield tensor, Piece(name, file_row, row, rows, place.columns)


def unknown_layout(name: str) -> Error:
    title = f"`{name}` lies in the files in a way that no rows of them are rows of it"
    fix = "load the adapter onto the model, patch.bake() it, and save_pretrained"
    return Error(Diagnostic("GP645", title, text=("transformers changes it while it loads",), fixes=(fix,)))


def _refuse_type(name: str, value: Tensor | None, slot: Slot) -> None:
    """Raise `Error` (GP643) where a trained weight is no float and the file's is, or the other way round."""
    if value is not None and value.dtype != slot.dtype and not (value.is_floating_point() and _adds(slot)):
        holds = str(value.dtype).removeprefix("torch.")
        title = f"the adapter brings `{name}` as {holds}, and the base has it as {slot.written}"
        raise Error(Diagnostic("GP643", title, fixes=("use the base as it was before it was quantised",)))


def _adds(slot: Slot) -> bool:
    return slot.dtype is not None and slot.dtype.is_floating_point
