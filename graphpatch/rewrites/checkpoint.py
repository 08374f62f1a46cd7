"""`checkpoint` on any module."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch.utils.checkpoint import checkpoint

from ..lang.diagnostics import ApplyError, Diagnostic
from ..ops.checkpoint import Checkpoint
from ..ops.op import Op
from .rewrite import InPlace

_CACHES = ("cache", "past_key_values", "past_key_value", "layer_past")


class Again(NamedTuple):
    preserve_rng: bool
    text: str


class Checkpointed(InPlace):
    """Runs again in the backward pass."""

    level: ClassVar[int] = Checkpoint.level
    entries: ClassVar[str] = "_checkpoint"
    _checkpoint: tuple[Again, ...] = ()

    @classmethod
    def entry(cls, op: Op, parameter: str | None = None) -> Again:
        return Again(cast(Checkpoint, op).preserve_rng, op.text())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not (self._checkpoint and self.training and torch.is_grad_enabled()):
            return super().forward(*args, **kwargs)
        held = next((name for name in _CACHES if kwargs.get(name) is not None), None)
        if held is not None:
            raise ApplyError(
                Diagnostic(
                    "GP565",
                    f"{type(self).__name__} is checkpointed, and `{held}` would be written to twice",
                    fixes=("train without a cache: model(..., use_cache=False)", "or model.config.use_cache = False"),
                )
            )
        again = self._checkpoint[-1].preserve_rng
        return checkpoint(super().forward, *args, use_reentrant=False, preserve_rng_state=again, **kwargs)
