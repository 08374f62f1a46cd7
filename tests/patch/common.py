"""What the tests of this room share: applying a text, and looking at all there is of a model."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import graphpatch

LORA = "patch :Linear with lora(rank=4, alpha=8)\nfreeze ** except @new"


def patch(model: nn.Module, text: str = LORA, **options: Any) -> graphpatch.Patch:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the base trains, in files that freeze nothing
        return graphpatch.apply(model, graphpatch.parse(text), **options)


def refused(code: str, model: nn.Module, text: str = LORA, **options: Any) -> str:
    """The text of the refusal, which must leave the model as it is."""
    before = state(model)
    with pytest.raises(graphpatch.Error) as caught:
        patch(model, text, **options)
    assert state(model) == before
    assert caught.value.code == code, str(caught.value)
    return str(caught.value)


def state(model: nn.Module) -> list[Any]:
    """All of a model that a patch may touch: objects, classes, `__dict__` keys, hooks, flags, bytes, attributes."""
    found: list[Any] = []
    for path, module in model.named_modules(remove_duplicate=False):
        plain = {k: v for k, v in module.__dict__.items() if isinstance(v, (int, float, str, bool, tuple, type(None)))}
        hooks = [list(v.items()) for k, v in module.__dict__.items() if isinstance(v, dict) and "hooks" in k]
        found.append((path, id(module), type(module), list(module.__dict__), plain, hooks, list(module._modules)))
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            content = None if tensor is None or tensor.is_meta else tensor.detach().clone().view(-1).tolist()
            found.append((path, name, id(tensor), tensor is not None and tensor.requires_grad, content))
    return found


def randomise(patch: graphpatch.Patch) -> None:
    """Adapters as if trained: B no longer zero."""
    torch.manual_seed(1)
    with torch.no_grad():
        for tensor in patch.adapter_state_dict().values():
            tensor.normal_(std=0.1)
