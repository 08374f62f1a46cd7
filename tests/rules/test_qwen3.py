"""A Llama and a Qwen 2 with norms on queries and keys, against Transformers' Qwen 3: logits bit for bit."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import graphpatch

from ..patch.common import patch, refused, state

SIZES = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 96, "rms_norm_eps": 1e-6, "pad_token_id": 0,
}  # fmt: skip
IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [0, 0, 20, 21, 22, 23]])


WINDOWS = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}
BASES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, attn_implementation="eager")),
    "llama with biases": lambda: LlamaForCausalLM(
        LlamaConfig(**SIZES, attn_implementation="eager", attention_bias=True)
    ),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, attn_implementation="eager")),
    "qwen2 with windows": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, attn_implementation="eager", **WINDOWS)),
}


def llama() -> LlamaForCausalLM:
    return BASES["llama"]().eval()


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_qwen_3(dtype, base, tmp_path):
    torch.manual_seed(0)
    windows = WINDOWS if "windows" in base else {}
    wanted = Qwen3ForCausalLM(Qwen3Config(**SIZES, attn_implementation="eager", **windows)).eval()
    with torch.no_grad():
        for name, p in wanted.named_parameters():
            p.normal_(std=0.5 if "norm" in name else 0.3)
    wanted.to(dtype).save_pretrained(tmp_path)
    model = BASES[base]().eval().to(dtype)
    with torch.no_grad():  # biases start at zero, and would hide that one is left
        for p in model.parameters():
            p.normal_(std=0.3)
    before = state(model)
    made = graphpatch.apply(model, "qwen3")
    graphpatch.load_weights(made, tmp_path)
    assert list(model.state_dict()) != [] and sorted(model.state_dict()) == sorted(wanted.state_dict())
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    told = [m.generate(IDS, attention_mask=(IDS != 0).long(), **options) for m in (wanted, model)]
    assert torch.equal(*told)
    outs = [m(IDS, attention_mask=(IDS != 0).long(), labels=IDS) for m in (wanted, model)]
    assert torch.equal(outs[0].logits, outs[1].logits)
    for out in outs:
        out.loss.backward()
    theirs = dict(wanted.named_parameters())
    # The gradients of a head are summed in another order of memory.
    exact = 0.02 if dtype == torch.bfloat16 else 1e-6
    for name, p in model.named_parameters():
        assert (p.grad - theirs[name].grad).norm() <= exact * theirs[name].grad.norm(), name
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(IDS, attention_mask=(IDS != 0).long()).logits, outs[0].logits)
        with torch.no_grad():
            other.model.layers[0].self_attn.q_norm.weight.zero_()  # its own norms, not the other model's
        assert not torch.equal(other(IDS).logits, model(IDS).logits)
    with made.disabled():
        assert not torch.equal(model(IDS).logits, wanted(IDS).logits)
    model.zero_grad()
    made.revert()
    assert [type(m) for m in model.modules()] == [type(m) for m in BASES[base]().modules()]
    # The very modules and parameters, in their order; the values of the weights are those that were loaded.
    assert [entry[:4] for entry in state(model)] == [entry[:4] for entry in before]


def test_what_is_dropped_comes_back_as_it_was():
    model = BASES["qwen2"]().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    before, logits = state(model), model(IDS).logits
    made = patch(model, "patch {q,k,v}_proj with bias.drop()")
    assert not any(name.endswith("bias") for name in model.state_dict()) and not torch.equal(model(IDS).logits, logits)
    with made.disabled():
        assert torch.equal(model(IDS).logits, logits)
    assert "6 already applied" in str(graphpatch.parse("patch {q,k,v}_proj with bias.drop()").plan(model))
    lora = patch(model, "patch {q,k,v}_proj with lora(rank=2)\nfreeze ** except @new")
    model.double().float()
    other = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    for each in (model, other):
        for one in reversed(graphpatch.patches(each)):
            one.revert()
        assert torch.equal(each(IDS).logits, logits)
    now, before = ([e for e in found if "inv_freq" not in str(e[1])] for found in (state(model), before))
    assert now == before  # but for the buffers, which `.to()` makes anew
    assert all(p.requires_grad for p in other.parameters()) and lora and made


def test_a_bias_frozen_before_it_was_dropped_is_given_back_free():
    model = BASES["qwen2"]()
    frozen = patch(model, "freeze **")
    made = patch(model, "patch q_proj with bias.drop()")
    frozen.revert()
    made.revert()
    assert all(p.requires_grad for p in model.parameters())


def test_dropping_on_meta_and_materialising(tmp_path):
    wanted = Qwen3ForCausalLM(Qwen3Config(**SIZES)).eval()
    with torch.device("meta"):
        model = BASES["qwen2"]().eval()
    made = graphpatch.apply(model, "qwen3")
    assert sorted(model.state_dict()) == sorted(wanted.state_dict())
    model.load_state_dict(wanted.state_dict(), assign=True)
    model.model.rotary_emb = wanted.model.rotary_emb
    assert torch.allclose(model(IDS).logits, wanted(IDS).logits, atol=1e-5)
    made.revert()
    assert not any(p.is_meta for p in model.parameters())


def test_what_cannot_go():
    told = refused("GP410", llama(), "patch q_proj with bias.drop()")
    assert "has no bias" in told and "where bias is not none" in told
    told = refused("GP410", llama(), "patch ^model.norm with bias.drop()")
    assert "does not accept LlamaRMSNorm" in told
    two = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    two[1].bias = two[0].bias
    assert "is that of `0" in refused("GP410", two, "patch ^1 with bias.drop()")
    told = refused("GP464", BASES["qwen2"](), "patch q_proj with bias.drop()\ntrain q_proj.bias")
    assert "is dropped by these rules" in told
    plan = graphpatch.parse("patch q_proj with bias.drop()\ntrain bias").plan(BASES["qwen2"]())
    assert plan.trainable == sum(p.numel() for n, p in BASES["qwen2"]().named_parameters() if "q_proj.bias" not in n)
    made = plan.apply(BASES["qwen2"]())
    assert sum(p.numel() for p in made.trainable_parameters()) == plan.trainable


def test_lora_is_normed_with_its_projection():
    model = llama()
    patch(model, 'patch q_proj with lora(rank=2, init="gaussian")\npatch self_attn with qk_norm(zero_centered=true)')
    attention, x = model.model.layers[0].self_attn, torch.randn(3, 48)
    with torch.no_grad():
        attention.q_proj.lora_B.normal_()
    q = attention.q_proj
    scale = graphpatch.parse("patch q_proj with lora(rank=2)").plan(llama()).steps[0].op
    raw = nn.functional.linear(x, q.weight + (scale.alpha or 2) / 2 * q.lora_B @ q.lora_A).view(3, 4, 16)
    wanted = raw / (raw.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert torch.allclose(q(x), wanted.view(3, 64), atol=1e-4)


def test_what_has_no_queries_or_norms_already():
    refused("GP555", llama(), "patch mlp with qk_norm(head_dim=4)")
    refused("GP502", Qwen3ForCausalLM(Qwen3Config(**SIZES)), "patch self_attn with qk_norm()")
    refused("GP410", nn.ModuleDict({"a": nn.Linear(2, 2)}), "patch a with qk_norm()")
