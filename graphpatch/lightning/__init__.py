"""For Lightning: a model is transformed when training starts, and its checkpoints hold what the transform brought."""

from .callback import ModelTransform as ModelTransform
from .loading import load_from_checkpoint as load_from_checkpoint
from .lora import LoRA as LoRA
from .peft import PEFT as PEFT

__all__ = ["PEFT", "LoRA", "ModelTransform", "load_from_checkpoint"]
