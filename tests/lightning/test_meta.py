"""A model built on the meta device is filled from its checkpoint, and then transformed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import save_file
from torch import nn

import graphpatch
from graphpatch.lightning import ModelTransform, load_from_checkpoint

from .common import SIZE, Module, Net, data, factors, trainer

RULES = 'patch linear_qkv | linear_proj with lora(rank=2, init="pissa")\nfreeze ** except @new'


class Tied(Net):
    """With a head whose weight is another's."""

    def __init__(self, position: bool = False):
        super().__init__(noise=True)
        self.foot = nn.Linear(SIZE, SIZE, bias=False)
        self.head = nn.Linear(SIZE, SIZE, bias=False)
        self.head.weight = self.foot.weight
        if position:
            self.register_buffer("position", torch.arange(SIZE), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(super().forward(self.foot(x)))


class OnMeta(Module):
    def __init__(self, device: str = "meta", position: bool = False):
        super().__init__(built="configure_model")
        self.device_of_net, self.position = device, position

    def build(self) -> None:
        if self.net is None:
            with torch.device(self.device_of_net):
                self.net = Tied(self.position)


def base(folder: Any) -> Any:
    torch.manual_seed(0)
    # As it is stored: each tensor once, and in half of the bytes.
    weights = {n: t.bfloat16() if t.is_floating_point() else t for n, t in Tied().state_dict().items()}
    save_file({n: t for n, t in weights.items() if n != "head.weight"}, folder / "base.safetensors")
    return folder / "base.safetensors"


def callback(path: Any) -> ModelTransform:
    return ModelTransform(graphpatch.parse(RULES), base_checkpoint=path)


def test_it_trains_as_a_model_that_was_never_there(tmp_path):
    path, fitted = base(tmp_path), []
    for device in ("meta", "cpu"):
        module, saver = OnMeta(device), ModelCheckpoint(tmp_path / device, save_last=True)
        torch.manual_seed(5)
        t = trainer(tmp_path, callback(path), saver, enable_checkpointing=True)
        module.configure_model()  # draws its weights here, where they are real
        torch.manual_seed(5)
        t.fit(module, data())
        assert module.net.head.weight is module.net.foot.weight
        fitted.append(module)
    assert fitted[0].losses == fitted[1].losses and len(factors(fitted[0])) == 8
    states = [module.state_dict() for module in fitted]
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert tensor.dtype == states[1][name].dtype and torch.equal(tensor, states[1][name]), name
    held = [torch.load(tmp_path / device / "last.ckpt", weights_only=True)["state_dict"] for device in ("meta", "cpu")]
    assert held[0].keys() == held[1].keys() and not any(
        name.endswith(("foot.weight", "norm.weight")) for name in held[0]
    )
    loaded = load_from_checkpoint(OnMeta, tmp_path / "meta" / "last.ckpt", base=path)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, states[0][name]), name


def test_what_stays_on_the_meta_device_is_told_of(tmp_path):
    path = base(tmp_path)
    for given, module, code in ((None, OnMeta(), "GP818"), (path, OnMeta(position=True), "GP822")):
        with pytest.raises(graphpatch.Error) as caught:
            trainer(tmp_path, callback(given)).fit(module, data())
        assert caught.value.code == code and "meta device" in str(caught.value)
        assert "cpu" not in vars(module)
