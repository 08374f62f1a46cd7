"""A Llama with norms on queries and keys, against Transformers' Qwen 3: logits bit for bit."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

import graphpatch

from ..patch.common import patch, refused, state

SIZES = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 96, "rms_norm_eps": 1e-6, "pad_token_id": 0,
}  # fmt: skip
IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [0, 0, 20, 21, 22, 23]])


def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SIZES, attn_implementation="eager")).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_qwen_3(dtype, tmp_path):
    torch.manual_seed(0)
    wanted = Qwen3ForCausalLM(Qwen3Config(**SIZES, attn_implementation="eager")).eval()
    with torch.no_grad():
        for name, p in wanted.named_parameters():
            p.normal_(std=0.5 if "norm" in name else 0.3)
    wanted.to(dtype).save_pretrained(tmp_path)
    model = llama().to(dtype)
    before = state(model)
    made = graphpatch.apply(model, "qwen3")
    graphpatch.load_weights(made, tmp_path)
    assert list(model.state_dict()) != [] and sorted(model.state_dict()) == sorted(wanted.state_dict())
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
    assert [type(m) for m in model.modules()] == [type(m) for m in llama().modules()]
    assert [entry[:3] for entry in state(model) if len(entry) == 7] == [e[:3] for e in before if len(e) == 7]


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
