"""Full activation recomputation beside a frozen base.

A layer that is recomputed asks whether what enters it needs a gradient, and not whether its parameters do. Below a
frozen embedding nothing does, so adapters would train nothing, or backward would find nothing to do.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..patch.in_place import InPlaceChange
from ..patch.patch import Patch
from ..rewrites.rewrite import InPlace


class Entry(NamedTuple):
    text: str = ""


class GradientsEnter(InPlace):
    """Of a `TransformerBlock`: what enters it needs a gradient."""

    entries: ClassVar[str] = "_gradients_enter"
    _gradients_enter: tuple[Entry, ...] = ()

    def forward(self, hidden_states: Tensor | None, *args: Any, **kwargs: Any) -> Any:
        enters = hidden_states is not None and torch.is_grad_enabled() and self.training
        if enters and self._gradients_enter and not hidden_states.requires_grad:  # type: ignore[union-attr]
            hidden_states = hidden_states.detach().requires_grad_()  # type: ignore[union-attr]
        return super().forward(hidden_states, *args, **kwargs)


def let_gradients_in(patch: Patch, chunk: nn.Module) -> None:
    """Where layers are recomputed whole: a part of the patch, which goes with it."""
    decoder: Any = getattr(chunk, "decoder", None)
    if decoder is None or getattr(getattr(chunk, "config", None), "recompute_granularity", None) != "full":
        return
    change = next((c for c in patch._journal.changes if isinstance(c, InPlaceChange)), None)
    if change is not None and not any(c.mixin is GradientsEnter for c in change.companions):
        change.accompany(0, decoder, GradientsEnter, Entry())
