"""An adapter as diffusers' pipelines read it: one file whose keys begin with the part of the pipeline they are for.

The config stands in the file's header, as JSON under `lora_adapter_metadata`; without it alpha is taken to be the rank
(diffusers 0.42.1, loaders/lora_base.py and utils/peft_utils.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from ...lang.diagnostics import Diagnostic, Error
from ...tree.tree import Tree
from .adapter import PREFIX
from .portable import Written

PARTS: Mapping[str, str] = {
    "UNet2DConditionModel": "unet",
    "UNetMotionModel": "unet",
    "UNet3DConditionModel": "unet",
    "CLIPTextModel": "text_encoder",
    "CLIPTextModelWithProjection": "text_encoder_2",
}
"""By the class of the model; all that end in `TransformerModel` or `Transformer2DModel` are `transformer`."""
_SETTINGS = (
    "alpha_pattern", "bias", "exclude_modules", "init_lora_weights", "lora_alpha", "lora_dropout", "r", "rank_pattern",
    "target_modules", "use_dora", "use_rslora",
)  # fmt: skip


def for_diffusers(portable: Written, tree: Tree, part: str | None = None) -> tuple[Written, str]:
    """The same adapter for diffusers, and what the header says of it. `part` is `unet`, `transformer` ...

    Raises `Error` (GP639) where the model's class does not say which part of a pipeline it is.
    """
    part = part or part_of(tree)
    tensors = {f"{part}.{key.removeprefix(PREFIX)}": tensor for key, tensor in portable.tensors.items()}
    config = {name: value for name, value in portable.config.items() if name in _SETTINGS}
    said = json.dumps({f"{part}.{name}": value for name, value in config.items()}, indent=2, sort_keys=True)
    return Written(config, tensors), said


def part_of(tree: Tree) -> str:
    """Which part of a pipeline a model is."""
    found = PARTS.get(tree.title)
    if found is None and tree.title.endswith("Model") and "Transformer" in tree.title:
        found = "transformer"
    if found is None:
        raise Error(
            Diagnostic(
                "GP639",
                f"{tree.title or 'a model without classes'} does not say which part of a pipeline it is",
                fixes=("name it: --part unet, transformer, text_encoder",),
            )
        )
    return found
