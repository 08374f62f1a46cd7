"""The whole model on disk, with its patches in the weights: what `from_pretrained` of any machine reads."""

from __future__ import annotations

import os
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..lang.diagnostics import Diagnostic, Error
from ..patch.patch import Patch, patches


def save_merged(model: nn.Module, directory: str | os.PathLike[str], **options: Any) -> None:
    """Merge the patches of `model`, save it as `save_pretrained` does, without the factors, and unmerge.

    The model is afterwards what it was, bit for bit; meanwhile copies of the merged weights are kept on the CPU. To go
    on with the merged model instead: `patch.bake()` and `model.save_pretrained(directory)`. `options` are those of
    `save_pretrained`.

    Raises `ApplyError` as `patch.merge()` does, where an op is no change of weights or a base is quantised, and `Error`
    (GP656) where the model is none of transformers; then nothing is written.
    """
    if not isinstance(model, PreTrainedModel):
        raise Error(
            Diagnostic(
                "GP656",
                f"{type(model).__name__} has no save_pretrained of transformers",
                fixes=("patch.bake(), and save its state_dict as you do without graphpatch",),
            )
        )
    merged: list[Patch] = []
    try:
        factors: set[str] = set()
        for patch in patches(model):
            if patch.changes and not patch.merged:
                patch.merge()
                merged.append(patch)
            below = next(path for path, module in model.named_modules() if module is patch.model)
            factors.update(f"{below}.{name}".removeprefix(".") for name in patch.adapter_state_dict())
        weights = {name: tensor for name, tensor in model.state_dict().items() if name not in factors}
        PreTrainedModel.save_pretrained(model, directory, state_dict=weights, **options)
    finally:
        for patch in reversed(merged):
            patch.unmerge()
