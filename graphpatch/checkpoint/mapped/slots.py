"""The places that a checkpoint's weights go to: a model's, or those of a model that stands on several ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from ...patch.over_ranks import over_ranks
from ...patch.patch import adapter_changes, patches


class Slot(NamedTuple):
    """One weight of the whole model."""

    tensor: Tensor | None
    """None where another rank has it."""
    shape: tuple[int, ...]
    """Of the whole."""
    cut: Callable[[Tensor], Tensor]
    """From the whole to this rank's part."""
    dim: int | None = None
    """The dimension of which this rank has a part; None where it has all."""

    @property
    def key(self) -> object:
        """The same for tied weights."""
        return id(self.tensor) if self.tensor is not None else object()


def slots_of(models: Sequence[nn.Module]) -> dict[str, Slot]:
    """What a model's checkpoints hold, by name; tied tensors under each of theirs. Of a model over several ranks,
    `models` are this one's chunks, and it is called on all."""
    model = models[0]
    theirs = over_ranks(model, "slots")
    if theirs is not None:
        return theirs(models)  # type: ignore[no-any-return]
    return {key: whole(tensor) for key, tensor in held_by(model).items()}


def held_by(model: nn.Module) -> Mapping[str, Tensor]:
    """The tensors that a checkpoint of the model holds: what adapters on it brought has files of its own."""
    state: Mapping[str, Any] = model.state_dict(keep_vars=True)
    of_adapters = set(map(id, _of_adapters(model)))
    return {key: value for key, value in state.items() if isinstance(value, Tensor) and id(value) not in of_adapters}


def _of_adapters(model: nn.Module) -> Iterator[Tensor]:
    for patch in patches(model):
        for change in adapter_changes(patch._journal):
            for module in change.modules:
                for path, _, name in (added.rpartition(".") for added in change.added):
                    owner = module.get_submodule(path)
                    yield owner._parameters.get(name) if name in owner._parameters else owner._buffers[name]  # type: ignore[misc]


def whole(tensor: Tensor) -> Slot:
    return Slot(tensor, tuple(tensor.shape), lambda value: value)
