"""Norms, activations and capped outputs, against Transformers' own modules."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM
from transformers.activations import ACT2FN
from transformers.models.gemma2.modeling_gemma2 import Gemma2Config, Gemma2ForCausalLM, Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import graphpatch
from graphpatch.ops.activation import Function
from graphpatch.rewrites.activation import FUNCTIONS

from ..patch.common import patch, refused

NEW = {"gelu_tanh": "gelu_pytorch_tanh"}


def llama(**options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, "num_key_value_heads": 2, "vocab_size": 64, **options}))


def filled(norm: nn.Module, dtype: torch.dtype) -> nn.Module:
    with torch.no_grad():
        for p in norm.parameters():
            p.normal_()
    return norm.to(dtype)


def both(one: nn.Module, other: nn.Module, dtype: torch.dtype) -> None:
    """Equal outputs and gradients, bit for bit."""
    found = []
    for norm in (one, other):
        torch.manual_seed(1)
        x = torch.randn(3, 5, 32, dtype=dtype, requires_grad=True)
        y = norm(x)
        y.square().sum().backward()
        found.append([y, x.grad, *(p.grad for p in norm.parameters())])
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_computes_as_that_of_another_family(dtype):
    for source, wanted, rule in (
        (LlamaRMSNorm(32, 1e-5), Gemma2RMSNorm(32, 1e-5), "norm.replace(zero_centered=true)"),
        (Gemma2RMSNorm(32, 1e-5), Gemma2RMSNorm(32, 1e-5), "norm.replace(zero_centered=true)"),
        (Gemma2RMSNorm(32, 1e-5), LlamaRMSNorm(32, 1e-5), "norm.replace()"),
        (nn.LayerNorm(32, 1e-5, bias=False), LlamaRMSNorm(32, 1e-3), 'norm.replace(kind="rms", eps=0.001)'),
        (LlamaRMSNorm(32, 1e-5), nn.LayerNorm(32, 1e-5, bias=False), 'norm.replace(kind="layer")'),
    ):
        filled(wanted, dtype)
        model = nn.ModuleDict({"norm": source.to(dtype)})
        weight = source.weight
        made = patch(model, f"patch norm with {rule}")
        assert model.norm is source and source.weight is weight and list(model.state_dict()) == ["norm.weight"]
        model.load_state_dict({"norm.weight": wanted.weight})
        both(source, wanted, dtype)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            x = torch.randn(2, 32, dtype=dtype)
            assert torch.equal(other.norm(x), model.norm(x))
        made.revert()
        assert type(source).__mro__[0] in (LlamaRMSNorm, Gemma2RMSNorm, nn.LayerNorm)


def test_a_bias_and_several_dimensions_are_kept():
    model = nn.ModuleDict({"norm": filled(nn.LayerNorm((4, 8)), torch.float64)})
    patch(model, "patch norm with norm.replace(eps=0)")
    x = torch.randn(3, 4, 8, dtype=torch.float64)
    wanted = x / x.square().mean((1, 2), keepdim=True).sqrt() * model.norm.weight + model.norm.bias
    assert torch.allclose(model.norm(x), wanted, atol=1e-12)


def test_what_is_no_norm_is_refused_by_name():
    refused("GP560", nn.ModuleDict({"norm": nn.Linear(4, 4)}), "patch norm with norm.replace()")
    refused("GP560", nn.ModuleDict({"norm": nn.BatchNorm1d(4)}), "patch norm with norm.replace()")
    refused("GP410", nn.ModuleDict({"a": nn.MultiheadAttention(4, 2)}), "patch a with norm.replace()")

    class MyNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

    refused("GP561", nn.ModuleDict({"norm": MyNorm()}), "patch norm with norm.replace()")
    refused("GP204", nn.ModuleDict({"norm": MyNorm()}), 'patch norm with norm.replace(kind="batch")')


RULES = """
patch layers[*].{self_attn,mlp} with norm.post(zero_centered=true)
patch layers[*].**.{o_proj,down_proj} with lora(rank=2)
patch ^lm_head with softcap.output(3.0)
patch ^lm_head with lora(rank=2)
freeze ** except @new
"""


@pytest.mark.parametrize("order", [1, -1])
def test_lora_stands_under_a_post_norm_and_a_cap_in_any_order_of_rules(order):
    model, ids = llama().double().eval(), torch.arange(12).reshape(2, 6)
    lines = RULES.strip().splitlines()
    made = patch(model, "\n".join([*lines[:4][::order], lines[4]]))
    with torch.no_grad():
        for parameter in made.trainable_parameters():
            parameter.normal_()
    seen: dict[str, Any] = {}
    for name in ("model.layers.1.mlp.down_proj", "model.layers.1.mlp", "lm_head"):
        module = model.get_submodule(name)
        module.register_forward_hook(lambda m, i, o, name=name: seen.update({name: (i[0], o)}))
    model(ids)

    down, mlp, head = (
        model.get_submodule(n) for n in ("model.layers.1.mlp.down_proj", "model.layers.1.mlp", "lm_head")
    )
    scale = _scale(model)
    inner = seen["model.layers.1.mlp.down_proj"][0]
    raw = F.linear(inner, down.weight + scale * (down.lora_B @ down.lora_A).double())
    normal = raw / (raw.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + mlp.post_norm.weight)
    assert torch.allclose(seen["model.layers.1.mlp"][1], normal, atol=1e-5)
    x, y = seen["lm_head"]
    logits = F.linear(x, head.weight + scale * (head.lora_B @ head.lora_A).double())
    assert torch.allclose(y, 3 * torch.tanh(logits / 3), atol=1e-5) and logits.abs().max() > 3


def _scale(model: nn.Module) -> float:
    """alpha / rank of the default."""
    (step,) = graphpatch.parse("patch ^lm_head with lora(rank=2)").plan(llama()).steps
    return step.op.alpha / 2 if step.op.alpha else 1.0


def test_post_norms_on_tuples_in_half_precision_and_after_a_save(tmp_path):
    model, ids = llama().bfloat16().eval(), torch.arange(12).reshape(2, 6)
    before = model(ids).logits
    made = patch(model, "patch @attn with norm.post() expect 2\nuse roles\nfreeze ** except @new")
    assert model.model.layers[0].self_attn.post_norm.weight.dtype == torch.bfloat16
    with torch.no_grad():
        for parameter in made.trainable_parameters():
            parameter.normal_()
    after = model(ids).logits
    assert after.dtype == torch.bfloat16 and not torch.equal(after, before)
    graphpatch.save_adapter(made, tmp_path / "a")
    other = llama().bfloat16().eval()
    graphpatch.load_adapter(other, tmp_path / "a")
    assert torch.equal(other(ids).logits, after)
    made.revert()
    assert torch.equal(model(ids).logits, before)
    refused("GP410", nn.ModuleDict({"a": nn.Tanh()}), "patch a with norm.post()")


def test_a_model_that_caps_its_logits_is_not_capped_twice():
    config = Gemma2Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, vocab_size=64,
    )  # fmt: skip
    text = refused("GP562", Gemma2ForCausalLM(config), "patch ^lm_head with softcap.output(5.0)")
    assert "final_logit_softcapping" in text


def test_a_capped_head_s_loss_is_that_of_capped_logits():
    model, ids = llama().double(), torch.arange(12).reshape(2, 6)
    plain = model(ids).logits
    patch(model, "patch ^lm_head with softcap.output(0.05)")
    out = model(ids, labels=ids)
    capped = 0.05 * torch.tanh(plain / 0.05)
    assert torch.allclose(out.logits, capped)
    loss = F.cross_entropy(capped[:, :-1].reshape(-1, 64).float(), ids[:, 1:].reshape(-1))
    assert out.loss.item() == pytest.approx(loss.item(), abs=1e-6)


def test_activations_are_transformers_own():
    x = torch.randn(200) * 4
    for kind in Function.__args__:
        assert torch.equal(FUNCTIONS[kind](x), ACT2FN[NEW.get(kind, kind)](x)), kind


def test_an_activation_that_is_a_module_and_one_that_is_a_function():
    model, ids = llama().eval(), torch.arange(12).reshape(2, 6)
    before, wanted = model(ids).logits, llama(hidden_act="gelu_pytorch_tanh").eval()(ids).logits
    made = patch(model, 'patch act_fn with activation("gelu_tanh") expect 2')
    assert torch.equal(model(ids).logits, wanted)
    assert torch.equal(copy.deepcopy(model)(ids).logits, wanted)
    made.revert()
    assert torch.equal(model(ids).logits, before)
    text = refused("GP563", model, 'patch mlp with activation("gelu_tanh")')
    assert "`act_fn`" in text

    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, activation="gelu").eval()
    torch.manual_seed(0)
    relu = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, activation="relu").eval()
    x = torch.randn(2, 3, 16)
    patch(nn.ModuleList([layer]), 'patch :TransformerEncoderLayer with activation("relu")')
    with torch.no_grad():  # by the fused path too
        assert torch.allclose(layer(x), relu(x), atol=1e-6)
    assert torch.allclose(layer.train()(x), relu.train()(x), atol=1e-6)


def test_bert_s_activation_is_a_module_of_its_own():
    def bert(**options: Any) -> BertModel:
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        return BertModel(BertConfig(**sizes, vocab_size=64, **options)).eval()

    model, ids = bert(), torch.arange(12).reshape(2, 6)
    patch(model, 'patch intermediate.intermediate_act_fn with activation("relu") expect 2')
    assert torch.equal(model(ids).last_hidden_state, bert(hidden_act="relu")(ids).last_hidden_state)
