"""The places that a checkpoint's weights go to: a model's, or those of a model that stands on several ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, NamedTuple

from torch import Tensor, nn

from ...patch.apply import OVER_RANKS

SHARDED = dict.fromkeys(OVER_RANKS, "graphpatch.megatron.weights:slots")
"""Classes of models of which a process may have a part, and the import path of what knows the places of the whole."""


class Slot(NamedTuple):
    """One weight of the whole model."""

    tensor: Tensor | None
    """None where another rank has it."""
    shape: tuple[int, ...]
    """Of the whole."""
    cut: Callable[[Tensor], Tensor]
    """From the whole to this rank's part."""

    @property
    def key(self) -> object:
        """The same for tied weights."""
        return id(self.tensor) if self.tensor is not None else object()


def slots_of(model: nn.Module) -> dict[str, Slot]:
    """What the model's checkpoints hold, by name; tied tensors under each of theirs. Called on all ranks."""
    names = (f"{c.__module__}.{c.__qualname__}" for c in type(model).__mro__)
    path = next((SHARDED[name] for name in names if name in SHARDED), None)
    if path is not None:
        module, _, name = path.partition(":")
        return getattr(import_module(module), name)(model)  # type: ignore[no-any-return]
    return {key: whole(tensor) for key, tensor in held_by(model).items()}


def held_by(model: nn.Module) -> Mapping[str, Tensor]:
    state: Mapping[str, Any] = model.state_dict(keep_vars=True)
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}


def whole(tensor: Tensor) -> Slot:
    return Slot(tensor, tuple(tensor.shape), lambda value: value)
