"""For Lightning: a model is transformed when training starts, and its checkpoints hold what the transform brought."""

from .atomic import AtomicIO as AtomicIO
from .atomic import last_whole as last_whole
from .callback import ModelTransform as ModelTransform
from .fabric import transform as transform
from .loader import ResumableDataLoader as ResumableDataLoader
from .loading import load_from_checkpoint as load_from_checkpoint
from .lora import LoRA as LoRA
from .peft import PEFT as PEFT

__all__ = [
    "PEFT",
    "AtomicIO",
    "LoRA",
    "ModelTransform",
    "ResumableDataLoader",
    "last_whole",
    "load_from_checkpoint",
    "transform",
]
