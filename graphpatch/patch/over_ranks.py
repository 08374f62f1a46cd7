"""Models of which a process may have a part: who does something to the whole of one, by import path."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from ..lang.diagnostics import ApplyError, Diagnostic
from .drift import unwrapped

if TYPE_CHECKING:
    from .patch import Patch

OVER_RANKS: Mapping[str, Mapping[str, str]] = {
    "megatron.core.transformer.module.MegatronModule": {
        "apply": "graphpatch.megatron.over_ranks:apply",
        "slots": "graphpatch.megatron.weights:slots",
        "to_peft": "graphpatch.megatron.peft:to_peft",
        "save_adapter": "graphpatch.megatron.files:save_adapter",
        "load_adapter": "graphpatch.megatron.files:load_adapter",
        "load_weights": "graphpatch.megatron.files:load_weights",
        "whole": "graphpatch.megatron.ranks:whole",
        "refuse": "graphpatch.megatron.ranks:refuse_parts",
        "replacing": "graphpatch.megatron.guard:refuse_other_shards",
    },
}
"""By qualified class name; the first of a model's MRO that stands here decides."""
_FILES = frozenset({"save_adapter", "load_adapter", "load_weights"})


def over_ranks(
    model: Any,
    what: Literal[
        "apply", "slots", "to_peft", "save_adapter", "load_adapter", "load_weights", "whole", "refuse", "replacing"
    ],
) -> Callable[..., Any] | None:
    """What does this to a model of which this process has a part, or a list of parts; None for any other. Files of an
    adapter need nothing of the kind where a process has the whole model."""
    several = isinstance(model, (list, tuple, nn.ModuleList)) and len(model) > 0
    part = unwrapped(model[0] if several else model)
    names = (f"{c.__module__}.{c.__qualname__}" for c in type(part).__mro__)
    known = next((OVER_RANKS[name] for name in names if name in OVER_RANKS), None)
    if known is None or (what in _FILES and not several and over_ranks(model, "whole")()):  # type: ignore[misc]
        return None
    module, _, name = known[what].partition(":")
    return getattr(import_module(module), name)  # type: ignore[no-any-return]


def parts(patch: Patch | Sequence[Patch]) -> list[Patch]:
    """The patches of a process: one, or those of its virtual chunks. Raises `ApplyError` (GP954) for several of another
    kind, of which each is an adapter of its own."""
    found: list[Patch] = list(patch) if isinstance(patch, (list, tuple)) else [patch]  # type: ignore[list-item]
    if len(found) != 1 and (not found or over_ranks([one.model for one in found], "slots") is None):
        raise ApplyError(
            Diagnostic(
                "GP954",
                f"{len(found)} patches are given for one adapter",
                text=("those of the virtual chunks of a megatron-core model go together, and no others",),
                fixes=("give one patch at a time",),
            )
        )
    return found


def refuse_parts(model: nn.Module, what: str) -> None:
    """Raise `ApplyError` where files of a whole model cannot be written or read by this process, which has a part of
    one."""
    refuse = over_ranks(model, "refuse")
    if refuse is not None:
        refuse(what)
