"""megatron-core: the same rules on models whose layers are sharded over ranks."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .over_ranks import apply as apply
    from .over_ranks import plan as plan

__all__ = ["apply", "plan"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'graphpatch.megatron' has no attribute {name!r}")
    return getattr(import_module("graphpatch.megatron.over_ranks"), name)
