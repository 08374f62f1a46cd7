"""LoRA+: B learns faster than A. Hayou et al., arXiv:2402.12354, section 4."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from ..lang.diagnostics import refusal
from ..rewrites.lora_base import Adapter, LoraModule
from ..rewrites.lora_embedding import LoraEmbedding
from .patch import Patch, adapter_changes, patches


def lora_plus(
    patch: Patch, *, lr: float, ratio: float = 16.0, weight_decay: float = 0.0, lr_embedding: float = 1e-6
) -> list[dict[str, Any]]:
    """Groups of parameters for any optimizer: `torch.optim.AdamW(graphpatch.lora_plus(patch, lr=1e-4))`.

    Every trainable parameter of the model stands in one of them, by PEFT's (and the authors') rules:

    - `lora_A`, and whatever else of two or more dimensions trains, at `lr`;
    - `lora_B` at `lr * ratio`; so are parameters of one dimension (a bias of B, DoRA's magnitudes, norms), which do not
      decay;
    - both factors on an embedding at `lr_embedding`: of a one-hot input, the width that the rule is about is one.

    Each group has a `name` ("A", "B", "B without decay", "embedding"); empty ones are left out. Raises `ApplyError`
    (GP539) where the model has no LoRA that trains, or for rates that are none.
    """
    for name, value in (("lr", lr), ("ratio", ratio), ("lr_embedding", lr_embedding)):
        if not _is_number(value) or value <= 0:
            raise refusal("GP539", f"`{name}` must be a number above 0, not {value!r}")
    if not _is_number(weight_decay) or weight_decay < 0:
        raise refusal("GP539", f"`weight_decay` must be a number, at least 0, not {weight_decay!r}")

    model = patch.model
    of_b, of_embeddings, adapters = _factors(model)
    groups: dict[str, list[nn.Parameter]] = {"A": [], "embedding": [], "B": [], "B without decay": []}
    for parameter in patch.trainable_parameters():
        key = id(parameter)
        if key in of_embeddings:
            groups["embedding"].append(parameter)
        elif parameter.dim() <= 1:
            groups["B without decay"].append(parameter)
        else:
            groups["B" if key in of_b else "A"].append(parameter)
    if not any(id(p) in adapters for some in groups.values() for p in some):
        raise refusal(
            "GP539",
            "no factor of LoRA trains in this model",
            "patch it with lora(...), and let the factors train: freeze ** except @new",
        )
    rates = {"A": lr, "embedding": lr_embedding, "B": lr * ratio, "B without decay": lr * ratio}
    return [
        {
            "params": some,
            "lr": rates[name],
            "weight_decay": 0.0 if name == "B without decay" else weight_decay,
            "name": name,
        }
        for name, some in groups.items()
        if some
    ]


def _factors(model: nn.Module) -> tuple[set[int], set[int], set[int]]:
    """The ids of all that is a B, that stands on an adapted embedding, and that is of any adapter."""
    of_b: set[int] = set()
    of_embeddings: set[int] = set()
    adapters: set[int] = set()
    for patch in patches(model):
        for change in adapter_changes(patch._journal):
            if not issubclass(change.mixin, LoraModule):
                continue
            adapter: Adapter = change.entry
            for module in change.modules:
                own = module._parameters
                adapters.update(id(own[name]) for name in change.added if name in own)
                if isinstance(module, LoraEmbedding):
                    of_embeddings.update(id(p) for p in own.values() if p is not None)
                else:
                    of_b.update(id(own.get(name)) for name in ([p.b for p in adapter.pairs] or [adapter.b]))
    return of_b, of_embeddings, adapters


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
