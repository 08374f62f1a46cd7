"""`quantize.*` as ops: planned, chained with LoRA, trained, saved, and taken back to the bit."""

from __future__ import annotations

import copy
import pickle

import peft
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import graphpatch

IDS = torch.arange(32).reshape(4, 8) % 50


def llama(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=50,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def trained(model: nn.Module, patch: graphpatch.Patch) -> list[float]:
    optimizer = torch.optim.Adam(patch.trainable_parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model(input_ids=IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("op", ["quantize.nf4(block=32)", "quantize.int8()", "quantize.int4(group=32)"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_the_place_of_the_weight_and_out_again_to_the_bit(op, dtype):
    model = llama(dtype)
    before, objects = model(IDS).logits, list(model.parameters())
    patch = graphpatch.apply(model, graphpatch.parse(f"patch {{q,up}}_proj with {op}\nfreeze **"))
    weight, dense = model.model.layers[0].self_attn.q_proj.weight, objects[1]
    assert isinstance(weight, nn.Parameter) and weight.shape == dense.shape and weight.dtype == dtype
    assert not weight.requires_grad and list(model.state_dict()) == list(llama().state_dict())
    # What it computes is what the dense weight that it stands for computes.
    other = llama(dtype)
    with torch.no_grad():
        for name, module in model.named_modules():
            if name.endswith(("q_proj", "up_proj")):
                other.get_submodule(name).weight.copy_(module.weight.dequantize())
    assert torch.equal(model(IDS).logits, other(IDS).logits) and not torch.equal(model(IDS).logits, before)
    with patch.disabled():
        assert torch.equal(model(IDS).logits, before)
    patch.revert()
    assert torch.equal(model(IDS).logits, before)
    assert all(a is b for a, b in zip(model.parameters(), objects))


def test_qlora_is_one_rule_file_trains_and_round_trips(tmp_path):
    model = llama()
    rules = graphpatch.load("qlora", rank=4)
    plan = rules.plan(model)
    assert len(plan.changes) == 28 and "Weights of 320.0 KiB in 45.0 KiB" in str(plan)
    patch = graphpatch.apply(model, rules)
    losses = trained(model, patch)
    assert losses[-1] < losses[0] - 0.3
    expected = model(IDS).logits
    graphpatch.save_adapter(patch, tmp_path / "adapter")
    assert set(patch.adapter_state_dict()) == {n for n, _ in model.named_parameters() if "lora_" in n}
    loaded = llama()
    graphpatch.load_adapter(loaded, tmp_path / "adapter")
    assert torch.equal(loaded(IDS).logits, expected)
    graphpatch.to_peft(patch, tmp_path / "peft")
    theirs = peft.PeftModel.from_pretrained(llama(), str(tmp_path / "peft")).eval()
    dense = llama()
    graphpatch.load_peft(dense, tmp_path / "peft")
    torch.testing.assert_close(theirs(IDS).logits, dense(IDS).logits, atol=1e-5, rtol=1e-5)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(IDS).logits, expected)
        graphpatch.patches(twin)[0].revert()
        assert torch.equal(twin(IDS).logits, llama()(IDS).logits)


def test_gradients_are_those_beside_the_dense_weight_that_it_stands_for():
    text = "patch q_proj with {} lora(rank=3)\nfreeze ** except @new"
    ours = llama()
    one = graphpatch.apply(ours, graphpatch.parse(text.format("quantize.nf4() then")))
    theirs = llama()
    with torch.no_grad():
        for layer, quantised in zip(theirs.model.layers, ours.model.layers):
            layer.self_attn.q_proj.weight.copy_(quantised.self_attn.q_proj.weight.dequantize())
    other = graphpatch.apply(theirs, graphpatch.parse(text.format("")))
    with torch.no_grad():
        for a, b in zip(one.trainable_parameters(), other.trainable_parameters()):
            b.copy_(a.normal_(std=0.1))
    for model in (ours, theirs):
        model(input_ids=IDS, labels=IDS).loss.backward()
    for a, b in zip(one.trainable_parameters(), other.trainable_parameters()):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-6, rtol=1e-5)


def test_originals_that_were_let_go_do_not_come_back():
    model = llama()
    patch = graphpatch.apply(model, graphpatch.parse("patch q_proj with quantize.nf4(keep=false)\nfreeze **"))
    expected = model(IDS).logits
    for way in (patch.revert, lambda: patch.disabled().__enter__()):
        with pytest.raises(graphpatch.ApplyError, match="load the base anew") as caught:
            way()
        assert caught.value.code == "GP541" and torch.equal(model(IDS).logits, expected)


@pytest.mark.parametrize(
    "text, code",
    [
        ("patch q_proj with quantize.nf4(block=24)", "GP463"),
        ("patch q_proj with quantize.nf4()\ntrain q_proj.weight", "GP464"),
        ("patch input_layernorm with quantize.nf4()", "GP410"),
        ("patch q_proj with quantize.nf4() then quantize.int8()", "GP407"),
    ],
)
def test_what_is_refused(text, code):
    with pytest.raises(graphpatch.Error) as caught:
        graphpatch.apply(llama(), graphpatch.parse(text))
    assert caught.value.code == code


def test_a_model_on_the_meta_device_is_planned_and_not_quantised():
    with torch.device("meta"):
        model = llama()
    rules = graphpatch.load("qlora", rank=4)
    assert len(rules.plan(model).changes) == 28
    with pytest.raises(graphpatch.ApplyError, match="no values") as caught:
        graphpatch.apply(model, rules)
    assert caught.value.code == "GP542"


def test_a_failure_later_on_takes_it_back(monkeypatch):
    from graphpatch.rewrites.lora import LoraLinear

    model = llama()
    before = list(model.parameters())
    monkeypatch.setattr(LoraLinear, "initialise", lambda *_: 1 / 0)
    with pytest.raises(graphpatch.ApplyError):
        graphpatch.apply(model, graphpatch.load("qlora", rank=4, keep=False))
    assert all(a is b for a, b in zip(model.parameters(), before))


def test_the_originals_follow_the_model_to_another_dtype():
    model = llama()
    patch = graphpatch.apply(model, graphpatch.parse("patch q_proj with quantize.nf4()\nfreeze **"))
    model.to(torch.bfloat16)
    expected = llama().to(torch.bfloat16)(IDS).logits
    with patch.disabled():
        assert torch.equal(model(IDS).logits, expected)
    patch.revert()
    assert torch.equal(model(IDS).logits, expected)


def test_codes_that_a_checkpoint_put_in_their_place_stay_after_disabled():
    model, other = llama(), llama()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    dense = model(IDS).logits
    rules = graphpatch.parse("patch {q,up}_proj with quantize.int8()\nfreeze **")
    patch, _ = (graphpatch.apply(one, rules) for one in (model, other))
    model.load_state_dict(other.state_dict(), assign=True)
    wanted = other(IDS).logits
    assert torch.equal(model(IDS).logits, wanted)
    with patch.disabled():
        assert not torch.equal(model(IDS).logits, wanted)
    assert torch.equal(model(IDS).logits, wanted) and not torch.equal(wanted, dense)
