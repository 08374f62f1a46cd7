"""Weights of the base by the names that a model has them under, from a checkpoint of it or a state dict."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch

from ...lang.diagnostics import Diagnostic, Error
from ..base_files import BaseFiles
from ..base_weights import find_names, refuse_missing, refuse_packed, refuse_shapes
from .converted import Place, Turned
from .pieces import locate, unknown_layout


def read_weights(
    source: str | PathLike[str] | Mapping[str, Any], wanted: Mapping[str, torch.Tensor]
) -> Mapping[str, torch.Tensor]:
    """The tensors of these names and shapes. Raises `Error`: GP641 where the files cannot be read, GP642 where names
    are missing, GP643 where shapes or types differ, GP645 as `locate` does."""
    shapes = {name: tuple(tensor.shape) for name, tensor in wanted.items()}
    if isinstance(source, Mapping):
        what, names = "the state dict", find_names(wanted, source)
        refuse_missing([name for name in wanted if name not in names], source, what)
        found = {name: source[names[name]] for name in wanted}
        wrong = [name for name, value in found.items() if not isinstance(value, torch.Tensor)]
        if wrong:
            title = f"`{wrong[0]}` of {what} is {type(found[wrong[0]]).__name__}, and no tensor"
            raise Error(Diagnostic("GP643", title))
    else:
        files = BaseFiles.open(source)
        what = files.folder.name
        located = locate({name: (name,) for name in wanted}, shapes, wanted, files)
        places = {name: there[0] for name, there in located.items()}
        packed = [
            (n, files.slots[t].written) for n, p in places.items() for t in _tensors(p) if not files.slots[t].dtype
        ]
        refuse_packed(packed, what)
        found = {name: _read(name, place, files) for name, place in places.items()}
    refuse_shapes([(name, tuple(found[name].shape), shape) for name, shape in shapes.items()], what)
    refuse_packed([(n, str(t.dtype)) for n, t in found.items() if not t.is_floating_point() or t.is_meta], what)
    return found


def _tensors(place: Place) -> list[str]:
    if isinstance(place.where, str):
        return [place.where]
    if isinstance(place.where, Turned):
        return [place.where.name]
    return list(dict.fromkeys(tensor for tensor, *_ in place.where or ()))


def _read(name: str, place: Place, files: BaseFiles) -> torch.Tensor:
    if isinstance(place.where, str):
        return files.read(place.where)
    if isinstance(place.where, Turned):
        return files.read(place.where.name).mT.contiguous()
    if place.where is None:
        raise unknown_layout(name)
    made = torch.empty(place.shape, dtype=files.slots[place.where[0][0]].dtype)
    rows = made.view(-1, place.columns)
    for tensor in _tensors(place):
        read = files.read(tensor).view(-1, place.columns)
        for _, file_row, row, count in (run for run in place.where if run[0] == tensor):
            rows[row : row + count] = read[file_row : file_row + count]
    return made
