"""Base weights that a loaded adapter brought: a change like those of its ops, so that reverting undoes it too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn

from ..patch.patch import Patch
from ..tree.tree import Mark
from .tensors import Place, journal_of, tensor_at


def brought(patch: Patch) -> frozenset[str]:
    """The names of the base weights that came with a loaded adapter."""
    changes = journal_of(patch).changes
    return frozenset(key for change in changes if isinstance(change, MovedWeights) for key in change.places)


@dataclass(eq=False)
class MovedWeights:
    """A `graphpatch.patch.change.Change`, already done: the values are in the live tensors."""

    brings_weights: ClassVar[bool] = True
    mark: Mark
    places: Mapping[str, Place]
    originals: Mapping[str, torch.Tensor]
    nodes: list[int] = field(default_factory=list)
    modules: list[nn.Module] = field(default_factory=list)
    """Neither has any: no class and no attribute was changed."""

    def do(self) -> None: ...

    def undo(self) -> None:
        self._put(self.originals)

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        held = {key: tensor_at(place) for key, place in self.places.items()}
        brought = {key: tensor.clone() for key, tensor in held.items() if tensor is not None}
        try:
            self._put(self.originals)
            yield
        finally:
            self._put(brought)

    def _put(self, values: Mapping[str, torch.Tensor]) -> None:
        with torch.inference_mode(False), torch.no_grad():
            for key, place in self.places.items():
                tensor = tensor_at(place)
                if tensor is not None and key in values:
                    tensor.copy_(values[key])
