"""Merging into weights that are kept as codes, in memory and on disk."""

from __future__ import annotations

import copy
import pickle

import peft
import pytest
import torch
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import LlamaConfig, LlamaForCausalLM

import graphpatch
from graphpatch.rewrites.quantised_tensor import QuantisedTensor

IDS = torch.arange(24).reshape(3, 8) % 50
pytestmark = pytest.mark.filterwarnings("ignore:graphpatch. .* quantised, and are so again:UserWarning")


def llama(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=50,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def filled(patch: graphpatch.Patch) -> graphpatch.Patch:
    with torch.no_grad():
        for name, tensor in patch.adapter_state_dict().items():
            tensor.normal_(std=0.05) if "magnitude" not in name else tensor.mul_(1.1)
    return patch


def qlora(model: nn.Module, op: str = "quantize.nf4(block=32)", lora: str = "lora(rank=4, alpha=8)"):
    text = f"patch q_proj with {op} then {lora}\nfreeze ** except @new"
    return filled(graphpatch.apply(model, graphpatch.parse(text)))


OPS = ["quantize.nf4(block=32)", "quantize.int8()", "quantize.int4(group=32)"]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lora", ["lora(rank=4, alpha=8)", "lora(rank=4, dora=true)"])
def test_the_sum_is_quantised_anew_and_comes_out_to_the_bit(op, dtype, lora):
    model = llama(dtype)
    patch = qlora(model, op, lora)
    layer = model.model.layers[0].self_attn.q_proj
    before, weight, dense = model(IDS).logits, layer.weight, layer.weight.dequantize().float()
    total = dense + (2 if "alpha" in lora else 1) * layer.lora_B.float() @ layer.lora_A.float()
    if "dora" in lora:
        total = layer.lora_magnitude[:, None] * total / total.norm(dim=1, keepdim=True)
    expected = QuantisedTensor.of(total.detach().to(torch.float32), weight.format).dequantize(dtype)
    with pytest.warns(UserWarning, match="rounded to codes anew"):
        patch.merge()
    assert isinstance(layer.weight, QuantisedTensor) and not layer.weight.requires_grad
    torch.testing.assert_close(layer.weight.dequantize(), expected, atol=2e-3, rtol=0.02)
    assert layer.weight.dequantize().sub(total).norm() < 0.15 * total.norm()
    assert not torch.equal(model(IDS).logits, before)
    merged = model(IDS).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(IDS).logits, merged)
        graphpatch.patches(twin)[0].unmerge()
        assert torch.equal(twin(IDS).logits, before)
    with patch.disabled():
        assert torch.equal(model(IDS).logits, llama(dtype)(IDS).logits)
    assert torch.equal(model(IDS).logits, merged)
    patch.unmerge()
    assert layer.weight is weight and torch.equal(model(IDS).logits, before)
    patch.merge()
    patch.revert()
    assert torch.equal(model(IDS).logits, llama(dtype)(IDS).logits)
    assert all(type(p) is nn.Parameter for p in model.parameters())


@pytest.mark.parametrize("keep", ["true", "false"])
def test_baked_it_is_a_quantised_model_without_a_patch(keep):
    model, other = llama(), llama()
    patch = qlora(model, f"quantize.nf4(block=32, keep={keep})")
    qlora(other)
    for name, parameter in other.named_parameters():
        if "lora" in name:
            parameter.data.copy_(model.get_parameter(name))
    graphpatch.patches(other)[0].merge()
    patch.bake()
    assert torch.equal(model(IDS).logits, other(IDS).logits)
    layer = model.model.layers[0].self_attn.q_proj
    assert type(layer) is nn.Linear and isinstance(layer.weight, QuantisedTensor)
    assert graphpatch.patches(model) == [] and list(model.state_dict()) == list(llama().state_dict())


def test_into_torchaos_codes_it_is_what_peft_makes_of_them():
    ours, theirs = llama(), llama()
    for model in (ours, theirs):
        quantize_(model, Int8WeightOnlyConfig(), lambda m, name: name.endswith("q_proj"))
    text = "patch q_proj with lora(rank=4, alpha=8)\nfreeze ** except @new"
    patch = filled(graphpatch.apply(ours, graphpatch.parse(text)))
    before, weight = ours(IDS).logits, ours.model.layers[0].self_attn.q_proj.weight
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"])
    base_layers = [layer.self_attn.q_proj for layer in theirs.model.layers]
    other = peft.get_peft_model(theirs, config).eval()
    for mine, layer in zip(ours.model.layers, other.base_model.model.model.layers):
        with torch.no_grad():
            layer.self_attn.q_proj.lora_A["default"].weight.copy_(mine.self_attn.q_proj.lora_A)
            layer.self_attn.q_proj.lora_B["default"].weight.copy_(mine.self_attn.q_proj.lora_B)
    for layer, base in zip(ours.model.layers, base_layers):
        total = base.weight.dequantize() + 2 * layer.self_attn.q_proj.lora_B @ layer.self_attn.q_proj.lora_A
        base.weight = nn.Parameter(total.detach(), requires_grad=False)
        quantize_(base, Int8WeightOnlyConfig())  # the steps of peft/tuners/lora/torchao.py, `merge`
    patch.merge()
    for layer, base in zip(ours.model.layers, base_layers):
        merged = layer.self_attn.q_proj.weight
        assert type(merged) is type(base.weight)
        torch.testing.assert_close(merged.dequantize(), base.weight.dequantize(), atol=1e-6, rtol=1e-5)
    patch.unmerge()
    assert ours.model.layers[0].self_attn.q_proj.weight is weight and torch.equal(ours(IDS).logits, before)


def test_on_disk_it_goes_into_the_base_as_it_was(tmp_path):
    model, base = llama(), llama()
    base.save_pretrained(tmp_path / "base")
    patch = qlora(model)
    graphpatch.save_adapter(patch, tmp_path / "adapter")
    graphpatch.to_peft(patch, tmp_path / "peft")
    plain = graphpatch.apply(base, graphpatch.parse("patch q_proj with lora(rank=4, alpha=8)\nfreeze ** except @new"))
    for name, tensor in plain.adapter_state_dict().items():
        tensor.copy_(patch.adapter_state_dict()[name])
    plain.bake()
    for adapter in ("adapter", "peft"):
        graphpatch.merge_checkpoint(tmp_path / "base", tmp_path / adapter, tmp_path / f"merged-{adapter}")
        merged = LlamaForCausalLM.from_pretrained(tmp_path / f"merged-{adapter}")
        for name, parameter in base.named_parameters():
            assert torch.equal(merged.get_parameter(name), parameter), name


def test_the_hash_of_a_base_is_that_of_its_weights_before_they_were_quantised(tmp_path):
    model = llama()
    patch = qlora(model)
    graphpatch.save_adapter(patch, tmp_path / "adapter", hash_base=True)
    again = llama()
    graphpatch.load_adapter(again, tmp_path / "adapter")
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    other = llama()
    with torch.no_grad():
        other.model.layers[0].self_attn.q_proj.weight.add_(1e-3)
    with pytest.raises(graphpatch.Error) as caught:
        graphpatch.load_adapter(other, tmp_path / "adapter")
    assert caught.value.code == "GP618"
    gone = llama()
    with pytest.raises(graphpatch.Error) as caught:
        graphpatch.save_adapter(qlora(gone, "quantize.int8(keep=false)"), tmp_path / "gone", hash_base=True)
    assert caught.value.code == "GP606"
