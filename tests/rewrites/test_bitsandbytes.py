"""LoRA on bitsandbytes' own linears, on the CPU, against PEFT on the same ones."""

from __future__ import annotations

import copy

import bitsandbytes as bnb
import peft
import pytest
import torch
from torch import nn

import graphpatch
from graphpatch.rewrites.quantised import dequantised, is_quantised, requantised


def model(kind: str) -> nn.Sequential:
    torch.manual_seed(0)
    made: list[nn.Module] = []
    for in_, out in ((64, 96), (96, 64)):
        dense = nn.Linear(in_, out)
        if kind == "8bit":
            layer = bnb.nn.Linear8bitLt(in_, out, has_fp16_weights=False)
        else:
            layer = bnb.nn.Linear4bit(in_, out, quant_type=kind, compute_dtype=torch.float32)
        layer.load_state_dict(dense.state_dict())
        made += [layer.requires_grad_(False), nn.Tanh()]
    return nn.Sequential(*made).to("cpu")


KINDS = ["nf4", "fp4", "8bit"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_weight_is_read_and_written(kind):
    layer = model(kind)[0]
    dense = dequantised(layer)
    assert is_quantised(layer.weight) and dense.shape == (96, 64)
    x = torch.eye(64)
    torch.testing.assert_close(layer(x) - layer.bias, dense.float().t(), atol=5e-3, rtol=0.02)
    again = requantised(layer, dense)
    assert type(again) is type(layer.weight) and again.dtype == layer.weight.dtype
    layer.weight = again
    torch.testing.assert_close(dequantised(layer), dense, atol=2e-3, rtol=0.02)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", ["", ", dora=true"])
def test_forward_and_gradients_are_pefts(kind, options):
    ours, theirs = model(kind), model(kind)
    setattr(theirs, "is_loaded_in_8bit" if kind == "8bit" else "is_loaded_in_4bit", True)  # what PEFT goes by
    patch = graphpatch.apply(
        ours, graphpatch.parse(f"patch *:Linear with lora(rank=4, alpha=8{options})\nfreeze ** except @new")
    )
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"], use_dora=bool(options))
    other = peft.get_peft_model(theirs, config)
    with torch.no_grad():
        for index in ("0", "2"):
            one, two = ours.get_submodule(index), theirs.get_submodule(index)
            two.lora_A["default"].weight.copy_(one.lora_A)
            two.lora_B["default"].weight.copy_(one.lora_B.normal_(std=0.3))
    x = torch.randn(5, 64)
    results = []
    for net in (ours, other):
        input = x.clone().requires_grad_()
        output = net(input)
        output.square().sum().backward()
        results.append((output, input.grad))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    for index in ("0", "2"):
        one, two = ours.get_submodule(index), theirs.get_submodule(index)
        torch.testing.assert_close(one.lora_A.grad, two.lora_A["default"].weight.grad, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(one.lora_B.grad, two.lora_B["default"].weight.grad, atol=1e-5, rtol=1e-4)
        if options:
            magnitude = two.lora_magnitude_vector["default"].weight
            torch.testing.assert_close(one.lora_magnitude, magnitude, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(one.lora_magnitude.grad, magnitude.grad, atol=1e-5, rtol=1e-4)
    expected = ours(x)
    assert torch.equal(copy.deepcopy(ours)(x), expected)
    patch.revert()
    assert torch.equal(ours(x), model(kind)(x)) and list(ours.state_dict()) == list(model(kind).state_dict())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_starts_from_the_weight_that_the_codes_stand_for(kind, init):
    ours = model(kind)
    x = torch.randn(3, 64)
    expected = ours(x)
    patch = graphpatch.apply(
        ours, graphpatch.parse(f'patch *:Linear with lora(rank=4, init="{init}")\nfreeze ** except @new')
    )
    assert torch.equal(ours(x), expected)
    dense = dequantised(ours[0]).float()
    if init == "pissa":
        left, values, right = torch.linalg.svd(dense, full_matrices=False)
        product = left[:, :4] * values[:4] @ right[:4]
    else:
        q, r = torch.linalg.qr(dense)
        product = q[:, :4] @ r[:4]
    torch.testing.assert_close(ours[0].lora_B @ ours[0].lora_A, product, atol=1e-4, rtol=1e-3)
    patch.revert()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("called", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_merged_it_has_pefts_codes_and_comes_out_to_the_bit(kind, called):
    ours, theirs = model(kind), model(kind)
    setattr(theirs, "is_loaded_in_8bit" if kind == "8bit" else "is_loaded_in_4bit", True)  # what PEFT goes by
    x = torch.randn(3, 64)
    patch = graphpatch.apply(ours, graphpatch.parse("patch *:Linear with lora(rank=4, alpha=8)\nfreeze ** except @new"))
    other = peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"]))
    with torch.no_grad():
        for index in ("0", "2"):
            one, two = ours.get_submodule(index), theirs.get_submodule(index)
            two.lora_A["default"].weight.copy_(one.lora_A)
            two.lora_B["default"].weight.copy_(one.lora_B.normal_(std=0.1))
    if called:
        ours(x)
        theirs(x)
    patch.merge()
    other.merge_adapter()
    torch.testing.assert_close(ours(x), other(x), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(dequantised(ours[0]), dequantised(theirs[0].base_layer), atol=1e-5, rtol=1e-4)
    patch.unmerge()
    twin = model(kind)
    assert torch.equal(dequantised(ours[0]), dequantised(twin[0]))
    patch.merge()
    patch.revert()
    assert torch.equal(ours(x), twin(x))
