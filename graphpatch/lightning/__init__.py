"""For Lightning: a model is transformed when training starts, and its checkpoints hold what the transform brought."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .atomic import AtomicIO as AtomicIO
from .atomic import last_whole as last_whole
from .callback import ModelTransform as ModelTransform
from .fabric import transform as transform
from .loader import ResumableDataLoader as ResumableDataLoader
from .loading import load_from_checkpoint as load_from_checkpoint
from .lora import LoRA as LoRA
from .peft import PEFT as PEFT

if TYPE_CHECKING:
    MegatronStrategy: Any

__all__ = [
    "PEFT",
    "AtomicIO",
    "LoRA",
    "MegatronStrategy",
    "ModelTransform",
    "ResumableDataLoader",
    "last_whole",
    "load_from_checkpoint",
    "transform",
]


def __getattr__(name: str) -> Any:
    # Of another room, and of megatron-core, which nobody else needs.
    if name != "MegatronStrategy":
        raise AttributeError(f"module 'graphpatch.lightning' has no attribute {name!r}")
    return import_module("graphpatch.megatron.strategy").MegatronStrategy
