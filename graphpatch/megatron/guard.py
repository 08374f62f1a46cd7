"""What another module in a module's place would make of a distributed checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ..ops.op import Refusal


def refuse_other_shards(module: nn.Module, made: nn.Module) -> None:
    """Raise `Refusal` (GP468) where a tensor of `module` that `made` holds too would be saved as another part of the
    whole. A module that says nothing of shards is saved as if every rank had all of it: megatron-core 0.19 writes that
    without a word."""
    here = {id(tensor): name for name, tensor in made.state_dict(keep_vars=True).items()}
    said = {at: shape for at, shape in _shapes(made) if at in here}
    for at, shape in _shapes(module):
        if at in here and said.get(at, ()) != shape:
            raise Refusal(
                f"its `{here[at]}` is a part of a tensor of {list(shape)} over the ranks, and {type(made).__name__} "
                f"would save it as {list(said.get(at, ()))}",
                "give that class a sharded_state_dict that asks the module inside",
                "or change the module in place: lora, norm.post and their like know what ranks hold",
                code="GP468",
            )


def _shapes(module: nn.Module) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Of each tensor, by its id, the shape of the whole that it is a part of."""
    from megatron.core.transformer.utils import sharded_state_dict_default

    for entry in sharded_state_dict_default(module, "", (), {}).values():
        whole = _whole(entry)
        if whole is not None:
            yield id(entry.data), whole


def _whole(entry: Any) -> tuple[int, ...] | None:
    shape = getattr(entry, "global_shape", None)
    if shape is not None:
        return tuple(int(size) for size in shape)
    if not hasattr(entry, "build"):
        return None  # no tensor: an extra state
    # Several matrices one behind the other: their rows are the rows of the whole.
    first, *others = entry.build()
    return (sum(int(one.global_shape[0]) for one in (first, *others)), *map(int, first.global_shape[1:]))
