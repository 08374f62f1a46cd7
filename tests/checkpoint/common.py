"""What the tests of this room share: a patched toy that has trained, saved."""

from __future__ import annotations

import json
import warnings
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphpatch
from tests.patch.common import state
from tests.toys import lm

LORA = "patch :Linear with lora(rank=4, alpha=8)\nfreeze ** except @new"
NORMS = LORA + "\ntrain :*Norm"
IDS = torch.arange(10).view(2, 5)


def trained(model: nn.Module, text: str = LORA, steps: int = 3, **options: Any) -> graphpatch.Patch:
    """Patched, and moved away from the identity by a few steps."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the base trains, in files that freeze nothing
        patch = graphpatch.apply(model, graphpatch.parse(text), **options)
    optimizer = torch.optim.SGD(patch.trainable_parameters(), lr=0.3)
    for _ in range(steps):
        optimizer.zero_grad()
        model(IDS).pow(2).mean().backward()
        optimizer.step()
    return patch


def saved(folder: Path, text: str = LORA, **options: Any) -> tuple[Path, torch.Tensor]:
    """An adapter of `lm()` in a folder, and the logits of the model it was saved from."""
    model = lm().eval()
    patch = trained(model, text, **options)
    graphpatch.save_adapter(patch, folder)
    return folder, model(IDS).detach()


def refused(code: str, model: nn.Module, folder: Path, **options: Any) -> str:
    """The text of the refusal to load, which must leave the model as it is."""
    before = state(model)
    with pytest.raises(graphpatch.Error) as caught:
        graphpatch.load_adapter(model, folder, **options)
    assert state(model) == before
    assert caught.value.code == code, str(caught.value)
    return str(caught.value)


def edit(folder: Path, change: Any) -> None:
    """Change `adapter.json`, as a value."""
    path = folder / "adapter.json"
    body = json.loads(path.read_text())
    change(body)
    path.write_text(json.dumps(body))


def rehash(folder: Path) -> None:
    """Make `adapter.json` vouch for the tensors that are there."""
    digest = sha256((folder / "adapter.safetensors").read_bytes()).hexdigest()
    edit(folder, lambda body: body["tensors"].update(sha256=digest))
