"""long_context, bitfit, norm_tuning, last_layers, and the ops `adapter.bottleneck` and `checkpoint`."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import graphpatch

from ..patch.common import patch, refused, state

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 64}
IDS = torch.arange(24).reshape(2, 12)


def llama(**options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 8, **options}))


def bert() -> BertForMaskedLM:
    return BertForMaskedLM(BertConfig(**SIZES))


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=64))


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "llama3"])
def test_long_context_is_transformers_own(kind):
    theirs = {"rope_type": kind, "factor": 4.0, "rope_theta": 10_000.0}
    more = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if kind == "llama3" else {}
    if kind in ("yarn", "llama3"):
        theirs |= {"original_max_position_embeddings": 8, **more}
    wanted, model = llama(rope_parameters=theirs).eval(), llama().eval()
    before, plain = state(model), model(IDS).logits
    if more:
        arguments = ", ".join(f"{k}={v}" for k, v in more.items())
        made = patch(model, f'patch rotary_emb with rope.scale("llama3", 4.0, {arguments})')
    else:
        made = graphpatch.apply(model, "long_context", kind=kind)
    assert torch.equal(model(IDS).logits, wanted(IDS).logits) and not torch.equal(model(IDS).logits, plain)
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(IDS, **options), wanted.generate(IDS, **options))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(IDS).logits, wanted(IDS).logits)
    made.revert()
    assert state(model) == before and torch.equal(model(IDS).logits, plain)


def test_what_scales_nothing_is_refused():
    refused("GP442", llama(), 'patch self_attn with rope.scale("linear", 2.0)')
    refused("GP204", llama(), 'patch rotary_emb with rope.scale("linear", 2.0, original=8)')
    refused("GP204", llama(), 'patch rotary_emb with rope.scale("llama3", 2.0)')
    refused("GP204", llama(), 'patch rotary_emb with rope.scale("linear", 0.5)')


def trained(model: Any, rules: str, **params: Any) -> set[str]:
    graphpatch.apply(model, rules, **params)
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_what_trains():
    for make in (bert, gpt2):
        names = {name for name, _ in make().named_parameters()}
        assert trained(make(), "bitfit") == {name for name in names if name.endswith("bias")}
    for make in (llama, bert, gpt2):
        norms = {name for name, _ in make().named_parameters() if "norm" in name.lower() or ".ln_" in name}
        assert trained(make(), "norm_tuning") == norms
    for make, layers in ((llama, "model.layers"), (bert, "bert.encoder.layer"), (gpt2, "transformer.h")):
        found = trained(make(), "last_layers", n=1)
        assert any(name.startswith(f"{layers}.2.") for name in found)
        assert not any(name.startswith((f"{layers}.0.", f"{layers}.1.")) for name in found)


def test_a_bottleneck_is_exact_at_first_and_trains(tmp_path):
    model = llama().eval()
    before = model(IDS).logits
    made = patch(
        model, "patch layers[*].mlp with adapter.bottleneck(dim=4) expect 1 per layers[*]\nfreeze ** except @new"
    )
    assert torch.equal(model(IDS).logits, before)
    model(IDS, labels=IDS).loss.backward()
    parameters = made.trainable_parameters()
    assert len(parameters) == 12 and model.model.layers[0].mlp.bottleneck.up.weight.grad.abs().max() > 0
    with torch.no_grad():
        for p in parameters:
            p.normal_()
    mlp, x = model.model.layers[1].mlp, torch.randn(2, 32)
    h = type(mlp)._graphpatch_base.forward(mlp, x)
    b = mlp.bottleneck
    wanted = h + torch.nn.functional.gelu(h @ b.down.weight.T + b.down.bias) @ b.up.weight.T + b.up.bias
    assert torch.allclose(mlp(x), wanted, atol=1e-5)
    graphpatch.save_adapter(made, tmp_path / "a")
    other = llama().eval()
    graphpatch.load_adapter(other, tmp_path / "a")
    assert torch.equal(other(IDS).logits, model(IDS).logits)
    made.revert()
    assert torch.equal(model(IDS).logits, before)


@pytest.mark.parametrize(
    "rules", ["", 'patch q_proj with lora(rank=2, init="gaussian", dropout=0.3)\nfreeze ** except @new']
)
def test_checkpointed_blocks_have_the_same_gradients(rules):
    found = []
    for checkpointed in (False, True):
        model = llama(attention_dropout=0.2).train()
        torch.manual_seed(2)
        if rules:
            patch(model, rules)
        if checkpointed:
            patch(model, "use roles\npatch @block with checkpoint(preserve_rng=true) expect 3")
        torch.manual_seed(1)
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*found)) and found[0]
    with pytest.raises(graphpatch.Error, match="GP565"):
        model(IDS, labels=IDS, use_cache=True)
    assert model.eval().generate(IDS, max_new_tokens=2, do_sample=False).shape == (2, 14)


def test_taps_are_heard_by_those_who_listen_alone():
    model = llama().eval()
    with pytest.raises(graphpatch.Error, match="GP566"), graphpatch.taps(model):
        pass
    made = patch(model, 'patch layers[::-2].mlp with tap("h") expect any\npatch self_attn with tap("a")')
    plain, outputs = llama().eval(), []
    for index in (0, 2):
        plain.model.layers[index].mlp.register_forward_hook(lambda m, i, o: outputs.append(o))
    wanted = plain(IDS).logits
    with graphpatch.taps(model) as seen, graphpatch.taps(copy.deepcopy(model)) as elsewhere:
        assert torch.equal(model(IDS).logits, wanted)
    model(IDS)
    assert [torch.equal(a, b) for a, b in zip(seen["h"], outputs)] == [True, True]
    assert len(seen["a"]) == 3 and not elsewhere
    with pytest.raises(KeyError):
        seen["b"]
    with graphpatch.taps(model) as seen:
        model(IDS)
        sum(h.square().mean() for h in seen["h"]).backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad is not None
    made.revert()
    with pytest.raises(graphpatch.Error, match="GP566"), graphpatch.taps(model):
        pass


def test_dropout_of_a_module_and_after_one():
    model = bert().train()
    patch(model, "patch :Dropout with dropout(0.0)")
    a, b = model(IDS).logits, model(IDS).logits
    assert torch.equal(a, b)
    made = patch(model, "patch output.dense with dropout(0.5) expect 6")
    dense, x = model.bert.encoder.layer[0].output.dense, torch.randn(50, 48)
    y, plain = dense(x), torch.nn.functional.linear(x, dense.weight, dense.bias)
    kept = y != 0
    assert 0.4 < kept.float().mean() < 0.6 and torch.allclose(y[kept], 2 * plain[kept])
    model.eval()
    assert torch.equal(dense(x), plain) and torch.equal(model(IDS).logits, a)
    made.revert()
    refused("GP410", model, "patch output.dense with dropout(0.0)")


def test_an_op_as_an_argument():
    model = llama()
    made = patch(
        model, 'patch mlp with insert_after("output", adapter.bottleneck(dim=4, act="relu"))\nfreeze ** except @new'
    )
    assert made.changes[0].op == 'adapter.bottleneck(dim=4, act="relu", features=32)'
    made.revert()
    for wrong in (
        'insert_after("input", adapter.bottleneck(dim=4))', "insert_after(adapter.bottleneck(dim=4))",
        'insert_before("output", adapter.bottleneck(dim=4))', 'insert_after("output", lora(rank=4))',
        'insert_after("output", checkpoint())', 'insert_before("input", insert_before("input", tap("h")))',
        'insert_before("query", tap("h"))', "insert_before()",
        'insert_after("output", 5)', 'insert_after("output", adapter.bottleneck(dim=0))',
    ):  # fmt: skip
        refused("GP204", model, f"patch mlp with {wrong}")
    refused("GP201", model, 'patch mlp with insert_after("output", adapter.bottelneck(dim=4))')
    refused("GP203", model, 'patch mlp with insert_after("output", adapter.bottleneck(dmi=4))')


def test_a_compiled_model_tells_those_who_listen_too():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    graphpatch.apply(model, graphpatch.parse('patch 0 with tap("h")'))
    compiled, x = torch.compile(model, fullgraph=True, backend="eager"), torch.randn(2, 4)
    compiled(x)
    with graphpatch.taps(model) as seen:
        compiled(x)
        with graphpatch.taps(model) as inner:
            compiled(x)
    compiled(x)
    assert len(seen["h"]) == 2 and len(inner["h"]) == 1 and torch.equal(seen["h"][0], model[0](x))
