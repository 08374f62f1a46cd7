"""Methods written by hand: a hook that is asked about every module, and gives a plan."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

import graphpatch
from graphpatch.lightning import PEFT, LoRA, ModelTransform
from graphpatch.ops.lora import Lora

from .common import Module, data, factors, trainer


class Beside(nn.Module):
    """A linear with a small one beside it, as NeMo's adapters wrap what they adapt."""

    def __init__(self, inner: nn.Linear):
        super().__init__()
        self.inner, self.beside = inner, nn.Linear(inner.in_features, inner.out_features)
        nn.init.zeros_(self.beside.weight)
        nn.init.zeros_(self.beside.bias)

    def forward(self, x):
        return self.inner(x) + self.beside(x)


class Wrapping(PEFT):
    def transform(self, module, name=None, prefix=None):
        return Beside(module) if name == "linear_proj" and prefix.endswith("layers.1") else module


class ByOp(PEFT):
    def __init__(self, rank=4):
        super().__init__()
        self.rank = rank

    def transform(self, module, name=None, prefix=None):
        return Lora(rank=self.rank) if name == "linear_qkv" else module


class Both(PEFT):
    def transform(self, module, name, prefix):
        return Beside(module) if name == "linear_proj" else Lora(rank=2) if name == "linear_qkv" else None

    def freeze_model(self):
        return "freeze ** except @new | norm"


def test_the_class_tree_is_nemo_s():
    assert LoRA.__mro__[1:4] == (PEFT, ModelTransform, ModelTransform.__mro__[1])


@pytest.mark.parametrize("method, trained", [(Wrapping, 2), (ByOp, 4), (Both, 4 + 4 + 2)])
def test_what_the_hook_answers_is_planned_trained_and_reverted(tmp_path, method, trained):
    module = Module()
    before, objects = {k: v.clone() for k, v in module.state_dict().items()}, list(module.modules())
    x = torch.randn(4, 8)
    expected = module.eval()(x)
    plan = method().plan(module)
    assert module.state_dict().keys() == before.keys() and list(module.modules()) == objects
    assert f"{method.__name__}.transform" in str(plan) or method is ByOp
    assert torch.allclose(method()(module)(x), expected)
    module.train()
    trainer(tmp_path, method()).fit(module, data())
    assert len([p for p in module.parameters() if p.requires_grad]) == trained
    assert len(graphpatch.patches(module)) == 1
    (patch,) = graphpatch.patches(module)
    patch.revert()
    assert list(module.modules()) == objects and module.state_dict().keys() == before.keys()
    for key, value in module.state_dict().items():
        if "norm" not in key:
            assert torch.equal(value, before[key])


def test_it_resumes(tmp_path):
    def fitted(epochs, module, path=None):
        torch.manual_seed(4)
        saver = ModelCheckpoint(tmp_path, save_last=True)
        trainer(tmp_path, Both(), saver, max_epochs=epochs, enable_checkpointing=True).fit(
            module, data(), ckpt_path=path
        )
        return module, saver.last_model_path

    whole, _ = fitted(4, Module())
    first, path = fitted(2, Module())
    held = torch.load(path, weights_only=True)["state_dict"]
    assert not any("inner" in name for name in held) and len(held) == 4 + 4 + 2 + 3
    second, _ = fitted(4, Module(), path)
    assert first.losses + second.losses == whole.losses


def test_tied_modules_are_asked_once(tmp_path):
    class Tied(Module):
        def build(self):
            super().build()
            self.net.layers[1] = self.net.layers[0]

    module = Tied()
    trainer(tmp_path, Both()).fit(module, data())
    assert module.net.layers[1] is module.net.layers[0] and len(factors(module)) == 2


class Changes(PEFT):
    def transform(self, module, name=None, prefix=None):
        if name == "linear_qkv":
            module.extra = nn.Parameter(torch.zeros(1))
        return module


class Nothing(PEFT):
    def transform(self, module, name=None, prefix=None):
        return module


class Odd(PEFT):
    def transform(self, module, name=None, prefix=None):
        return "lora" if name == "linear_qkv" else module


class Root(PEFT):
    def transform(self, module, name=None, prefix=None):
        return nn.Identity() if not name else module


@pytest.mark.parametrize(
    "method, code", [(Changes, "GP841"), (Nothing, "GP842"), (Odd, "GP840"), (Root, "GP843"), (PEFT, None)]
)
def test_what_a_hook_may_not_do(tmp_path, method, code):
    error = graphpatch.Error if code else NotImplementedError
    with pytest.raises(error) as caught:
        trainer(tmp_path, method()).fit(Module(), data())
    assert code is None or caught.value.code == code
