"""megatron-core: the same rules on models whose layers are sharded over ranks."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .over_ranks import apply as apply
    from .over_ranks import plan as plan
    from .peft import to_peft as to_peft

_HOME = {"apply": "over_ranks", "plan": "over_ranks", "to_peft": "peft"}
__all__ = ["apply", "plan", "to_peft"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'graphpatch.megatron' has no attribute {name!r}")
    return getattr(import_module(f"graphpatch.megatron.{_HOME[name]}"), name)
