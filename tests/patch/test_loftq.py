"""`lora(init="loftq")`: the factors give back what quantising took, as far as their rank goes."""

from __future__ import annotations

import pytest
import torch
from peft.utils.loftq_utils import _low_rank_decomposition
from torch import nn
from transformers.pytorch_utils import Conv1D

import graphpatch

FREEZE = "\nfreeze ** except @new"


def linear(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 48)).to(dtype)


@pytest.mark.parametrize("op", ["quantize.nf4()", "quantize.int4(group=32, keep=false)", "quantize.int8()"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_factors_are_pefts_of_the_same_residual(op, dtype):
    model, dense = linear(dtype), linear(dtype)[0].weight.detach().float()
    graphpatch.apply(model, graphpatch.parse(f'patch ^0 with {op} then lora(rank=8, init="loftq"){FREEZE}'))
    residual = dense - model[0].weight.dequantize().float()
    expected = _low_rank_decomposition(residual, reduced_rank=8)  # what PEFT's loftq_init does with it
    product = model[0].lora_B @ model[0].lora_A
    torch.testing.assert_close(product, expected["L"] @ expected["R"], atol=1e-6, rtol=1e-4)
    assert (residual - product).norm() < 0.9 * residual.norm()


def test_the_scale_is_taken_out_and_dora_and_conv1d_too():
    for options in ("alpha=32", "alpha=2, use_rslora=true", "dora=true"):
        model, dense = linear(), linear()[0].weight.detach()
        text = f'patch ^0 with quantize.nf4() then lora(rank=8, {options}, init="loftq"){FREEZE}'
        patch = graphpatch.apply(model, graphpatch.parse(text))
        x = torch.eye(64)
        lost = (dense - model[0].weight.dequantize()).norm()
        started = model(x) - model[0].bias
        assert (started.t() - dense).norm() < 0.9 * lost
        patch.revert()
        assert torch.equal(model[0].weight, dense)
    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(48, 64))
    before = model[0].weight.detach().clone()
    text = f'patch ^0 with quantize.nf4(block=16) then lora(rank=8, init="loftq"){FREEZE}'
    graphpatch.apply(model, graphpatch.parse(text))
    started = model(torch.eye(64)) - model[0].bias
    assert (started - before).norm() < 0.9 * (model[0].weight.dequantize() - before).norm()


def test_from_what_an_earlier_patch_kept_and_from_the_file(tmp_path):
    model, once = linear(), linear()
    graphpatch.apply(model, graphpatch.parse("patch ^0 with quantize.nf4()\nfreeze **"))
    graphpatch.apply(model, graphpatch.parse(f'patch ^0 with lora(rank=8, init="loftq"){FREEZE}'))
    patch = graphpatch.apply(
        once, graphpatch.parse(f'patch ^0 with quantize.nf4() then lora(rank=8, init="loftq"){FREEZE}')
    )
    x = torch.randn(3, 64)
    assert torch.equal(model(x), once(x))
    graphpatch.save_adapter(patch, tmp_path)
    loaded = linear()
    graphpatch.load_adapter(loaded, tmp_path)
    assert torch.equal(loaded(x), once(x))


@pytest.mark.parametrize("first", ["", "patch ^0 with quantize.nf4(keep=false)\nfreeze **"])
def test_without_the_weight_as_it_was_it_is_refused(first):
    model = linear()
    if first:
        graphpatch.apply(model, graphpatch.parse(first))
    keys = list(model.state_dict())
    with pytest.raises(graphpatch.ApplyError) as caught:
        graphpatch.apply(model, graphpatch.parse(f'patch ^0 with lora(rank=8, init="loftq"){FREEZE}'))
    assert caught.value.code == "GP595" and list(model.state_dict()) == keys
    with pytest.raises(graphpatch.Error):
        graphpatch.parse('patch ^0 with lora(rank=8, init="loftq", iterations=3)').plan(model)
