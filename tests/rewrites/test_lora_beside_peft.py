"""Where PEFT 0.21 goes wrong: what ours does right, with PEFT beside it doing otherwise."""

from __future__ import annotations

import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import graphpatch


def rules(selector: str, arguments: str = "rank=4") -> graphpatch.RuleSet:
    return graphpatch.parse(f"patch {selector} with lora({arguments})\nfreeze ** except @new")


def theirs_of(model: nn.Module, targets: list[str], **options) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, **{"r": 4, **options}))


def moved(parameters) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.3 * torch.randn_like(parameter))


class Alias(nn.Module):
    """One module under two names, as encoder-decoders and looped transformers have it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 6)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


def test_a_module_under_two_names_is_adapted_under_both():
    x, ours = torch.randn(3, 6), Alias()
    patch = graphpatch.apply(ours, rules("**.first"))
    moved(patch.trainable_parameters())
    layer = ours.first
    weight = layer.weight + layer.lora_B @ layer.lora_A
    both = nn.functional.linear(torch.relu(nn.functional.linear(x, weight, layer.bias)), weight, layer.bias)
    torch.testing.assert_close(ours(x), both)
    assert ours.second is ours.first and len(patch.changes) == 1

    theirs = theirs_of(Alias(), ["first"]).base_model.model
    assert not hasattr(theirs.second, "lora_A")  # this path goes on without the adapter


def tied() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20, n_positions=8)).eval()


def test_a_tied_head_never_parts_from_its_embedding():
    ids = torch.randint(20, (1, 5))
    with pytest.raises(graphpatch.PlanError) as caught:
        graphpatch.apply(tied(), rules("**.lm_head"))
    assert caught.value.code == "GP424"

    theirs = theirs_of(tied(), ["lm_head"]).eval()
    moved(p for p in theirs.parameters() if p.requires_grad)
    before = theirs(ids).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = theirs.merge_and_unload()(ids).logits
    assert (merged - before).abs().max() > 0.1  # the embedding changed with the head


def test_a_new_adapter_follows_the_mode_of_its_model():
    x = torch.randn(3, 6)
    ours = nn.Sequential(nn.Linear(6, 6)).eval()
    moved(graphpatch.apply(ours, rules("^0", "rank=4, dropout=0.5")).trainable_parameters())
    assert torch.equal(ours(x), ours(x))

    theirs = theirs_of(nn.Sequential(nn.Linear(6, 6)).eval(), ["0"], lora_dropout=0.5)
    moved(p for p in theirs.parameters() if p.requires_grad)
    inner = theirs.base_model.model
    assert not inner.training and not torch.equal(inner(x), inner(x))  # its dropout is on


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.mlp = nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.attn(x))


def test_an_adapter_may_be_called_as_a_module_is(tmp_path):
    ours = Named()
    patch = graphpatch.apply(ours, rules(":Linear"))
    graphpatch.apply(ours, rules(":Linear"), adapter="mlp")
    graphpatch.save_adapter(patch, tmp_path / "ours")
    assert len(load_file(tmp_path / "ours" / "adapter.safetensors")) == 4

    theirs = theirs_of(Named(), ["attn", "0"])
    theirs.add_adapter("mlp", peft.LoraConfig(target_modules=["attn", "0"], r=4))
    theirs.save_pretrained(tmp_path / "theirs")
    assert len(load_file(tmp_path / "theirs" / "adapter_model.safetensors")) == 2  # those of mlp.0 are lost


def test_a_convolution_in_groups_is_merged():
    x = torch.randn(2, 4, 5, 5)
    ours = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2))
    patch = graphpatch.apply(ours, rules("^0", "rank=4, dora=true"))
    moved(patch.trainable_parameters())
    before = ours(x)
    patch.merge()
    torch.testing.assert_close(ours(x), before, atol=1e-5, rtol=1e-5)

    theirs = theirs_of(nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)), ["0"])
    with pytest.raises(NotImplementedError):
        theirs.merge_adapter()


def test_dora_on_one_row_and_on_a_row_of_zeros():
    ours, theirs = nn.Sequential(nn.Linear(6, 5)), theirs_of(nn.Sequential(nn.Linear(6, 5)), ["0"], use_dora=True)
    graphpatch.apply(ours, rules("^0", "rank=4, dora=true"))
    assert ours(torch.randn(6)).shape == (5,) and theirs(torch.randn(6)).shape == (1, 5)

    zero, x = nn.Sequential(nn.Linear(6, 5)), torch.randn(3, 6)
    nn.init.zeros_(zero[0].weight)
    nan = theirs_of(nn.Sequential(nn.Linear(6, 5)), ["0"])  # a new base, since PEFT changes the one it is given
    nn.init.zeros_(nan.base_model.model[0].base_layer.weight)
    nan = theirs_of(nan.unload(), ["0"], use_dora=True)
    graphpatch.apply(zero, rules("^0", "rank=4, dora=true"))
    assert zero(x).isfinite().all() and nan(x).isnan().any()


def test_olora_on_the_conv1d_of_transformers():
    """Its weight is (in, out); PEFT takes it for (out, in)."""
    torch.manual_seed(0)
    ours = nn.Sequential(Conv1D(6, 6))
    weight, x = ours[0].weight.detach().clone(), torch.randn(3, 6)
    graphpatch.apply(ours, rules("^0", 'rank=2, init="olora"'))
    q, r = torch.linalg.qr(weight.T)
    torch.testing.assert_close(ours[0].lora_B @ ours[0].lora_A, q[:, :2] @ r[:2])

    base = nn.Sequential(Conv1D(6, 6))
    base[0].weight.data.copy_(weight)
    before = base(x)
    theirs = theirs_of(base, ["0"], r=2, lora_alpha=2, init_lora_weights="olora", fan_in_fan_out=True)
    assert (theirs(x) - before).abs().max() > 1e-3  # no longer the model it was


def test_dora_compiles_whole():
    torch.compiler.reset()
    x = torch.randn(3, 6)
    ours = nn.Sequential(nn.Linear(6, 5))
    moved(graphpatch.apply(ours, rules("^0", "rank=4, dora=true")).trainable_parameters())
    compiled = torch.compile(ours, fullgraph=True, backend="eager")(x)
    torch.testing.assert_close(compiled, ours(x))

    theirs = theirs_of(nn.Sequential(nn.Linear(6, 5)), ["0"], use_dora=True)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(theirs, fullgraph=True, backend="eager")(x)
