"""What holds of every op: planned without values, exact revert, copies and pickles, saved and loaded, on meta."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import graphpatch
from graphpatch.ops.registry import _BUILT_IN

from ..patch.common import patch, state

IDS = torch.arange(1, 17).reshape(2, 8)

CASES = {
    "activation": 'patch act_fn with activation("gelu")',
    "adapter.bottleneck": "patch mlp with adapter.bottleneck(dim=4)",
    "attention.causal": "patch self_attn with attention.causal(false)",
    "attention.scale": "patch self_attn with attention.scale(by=0.5)",
    "attention.window": "patch self_attn with attention.window(3)",
    "bias.drop": "patch {q,k}_proj with bias.drop()",
    "cast": 'patch mlp with cast("float64")',
    "checkpoint": "patch layers[*] with checkpoint()",
    "compile": 'patch mlp with compile(backend="eager")',
    "dropout": "patch mlp with dropout(0.5)",
    "embedding.extend": "patch embed_tokens with embedding.extend(4)",
    "embedding.resize": "patch embed_tokens with embedding.resize(70)",
    "head.classify": "patch ^lm_head with head.classify(labels=3)",
    "head.embed": 'patch ^ with head.embed(dim=32, pool="mean")',
    "head.medusa": "patch ^ with head.medusa(2)",
    "head.regress": "patch ^lm_head with head.regress()",
    "head.reward": "patch ^lm_head with head.reward()",
    "head.token_classify": "patch ^lm_head with head.token_classify(labels=3)",
    "head.value": "patch ^ with head.value()",
    "insert_before": 'patch self_attn with insert_before("input", norm.post())',
    "layers.drop": "patch layers with layers.drop([1])",
    "layers.repeat": "patch layers with layers.repeat([[0, 2], [1, 3]])",
    "lora": "patch q_proj with lora(rank=2)",
    "norm.post": "patch mlp with norm.post()",
    "norm.replace": 'patch :*RMSNorm with norm.replace("rms", zero_centered=true)',
    "qk_norm": "patch self_attn with qk_norm()",
    "quantize.int4": "patch q_proj with quantize.int4(group=32)",
    "quantize.int8": "patch q_proj with quantize.int8()",
    "quantize.nf4": "patch q_proj with quantize.nf4(block=32)",
    "rope.scale": 'patch rotary_emb with rope.scale("linear", factor=2.0)',
    "scale.output": "patch mlp with scale.output(2.0)",
    "set": "patch :*RMSNorm with set(variance_epsilon=0.1)",
    "softcap.attention": "patch self_attn with softcap.attention(1.0)",
    "softcap.output": "patch ^lm_head with softcap.output(0.5)",
    "tap": 'patch mlp with tap("h")',
}
ELSEWHERE = {"replace", "wrap"}
"""They build what the caller names: tests/patch/test_modules.py."""
SAME = {"checkpoint", "compile", "tap", "dropout"}
"""These may leave the logits as they are: in eval mode, or where no new token is asked for."""


def made() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, vocab_size=64,
        num_hidden_layers=3, tie_word_embeddings=True, pad_token_id=0, attn_implementation="eager",
        attention_bias=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.q_proj.bias)
    return model


def outputs(model: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        found = model(input_ids=IDS, attention_mask=torch.ones_like(IDS))
    return [value for value in found.values() if isinstance(value, torch.Tensor)]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def test_every_op_has_a_case():
    assert CASES.keys() | ELSEWHERE == set(_BUILT_IN)


@pytest.mark.parametrize("op", CASES)
def test_what_holds_of_every_op(op, tmp_path):
    model = made()
    before, plain = state(model), outputs(model)
    done = patch(model, CASES[op] + "\nfreeze ** except @new")
    for tensor in done.adapter_state_dict().values():
        if tensor.is_floating_point() and op != "layers.repeat":
            tensor.normal_(std=0.3)
    changed = outputs(model)
    assert all(torch.isfinite(value).all() for value in changed)
    if op not in SAME:
        assert not same(changed, plain)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same(outputs(other), changed)
        graphpatch.patches(other)[0].revert()
        assert same(outputs(other), plain)
    graphpatch.save_adapter(done, tmp_path / "a")
    again = made()
    loaded = graphpatch.load_adapter(again, tmp_path / "a")
    assert same(outputs(again), changed)
    loaded.revert()
    assert same(outputs(again), plain)
    with done.disabled():
        assert same(outputs(model), plain)
    done.revert()
    assert state(model) == before


@pytest.mark.parametrize("op", [op for op in CASES if not op.startswith("quantize")])
def test_on_the_meta_device(op):
    with torch.device("meta"):
        model = made()
    keys = list(model.state_dict())
    done = patch(model, CASES[op])
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    done.revert()
    assert list(model.state_dict()) == keys
