"""An adapter on a GPTModel over ranks, loaded by PEFT on the Hugging Face model: the same logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.nn import functional as F
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import graphpatch

from ..rules.test_gemma import family
from ..rules.test_gemma import rules as rules_of
from .models import fill, gathered, global_name
from .pool import one, ranks
from .training import chunks_of

SIZES: dict[str, Any] = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 96, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    "max_position_embeddings": 128, "pad_token_id": None,
}  # fmt: skip
OURS = {
    "hidden_size": 48,
    "ffn_hidden_size": 80,
    "kv_channels": 16,
    "layernorm_epsilon": 1e-6,
    "activation_func": F.silu,
}
IDS = torch.arange(24).reshape(2, 12) * 7 % 96
EVERY = "linear_qkv | linear_proj | linear_fc1 | linear_fc2"
MAPS = {"mixtral": "hf_mixtral"}
FROZEN = "freeze ** except @new\n"
ADAPTERS = {
    "lora": f"patch {EVERY} with lora(rank=4, alpha=8)",
    "dora": f"patch {EVERY} with lora(rank=4, alpha=8, dora=true)",
    "norms": f"patch {EVERY} with lora(rank=4, alpha=8)\ntrain *layernorm",
    "experts": "patch ^decoder.layers[1:3].**.local_experts[*].linear_fc2 with lora(rank=4, alpha=8)\n"
    "patch linear_qkv with lora(rank=2)",
    "vocabulary": "patch ^embedding.word_embeddings with lora(rank=4, alpha=8)\npatch linear_qkv with lora(rank=2)",
    "parts": 'patch linear_qkv with lora(rank=4, alpha=8, parts=["q", "v"])\n'
    'patch ^decoder.layers[1:3].mlp.linear_fc1 with lora(rank=2, parts=["up"])',
}


def made(name: str) -> PreTrainedModel:
    if name.startswith("gemma"):
        return family(name)
    torch.manual_seed(0)
    kinds: dict[str, tuple[Any, Any]] = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "mistral": (MistralConfig, MistralForCausalLM),
        "mixtral": (MixtralConfig, MixtralForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    }
    config, cls = kinds[name]
    sizes = {k: v for k, v in SIZES.items() if name != "qwen2" or k != "head_dim"}
    if name == "qwen2":
        sizes["hidden_size"] = 64
    if name == "mixtral":
        rope = {"rope_type": "default", "rope_theta": 10_000.0}
        sizes |= {"num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": rope}
    model = cls(config(**sizes)).eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            parameter.normal_(std=0.2 if name == "mixtral" else 0.3, mean=1.0 if "norm" in path else 0.0)
    return model


def options(name: str) -> dict[str, Any]:
    if name == "qwen2":
        return {**OURS, "hidden_size": 64, "add_qkv_bias": True}
    if name == "qwen3":
        return {**OURS, "qk_layernorm": True}
    if name == "mixtral":
        return {**OURS, "num_moe_experts": 4, "moe_router_topk": 2, "moe_aux_loss_coeff": 0.0}
    return {**OURS, "tied": name.startswith("gemma")}


def exported(name: str, base: str, adapter: str, folder: str) -> Any:
    chunks = chunks_of(gather=True, **options(name))
    if name.startswith("gemma"):
        graphpatch.load_weights(graphpatch.apply(chunks, rules_of(name)), base)
        patches = graphpatch.apply(chunks, graphpatch.parse(FROZEN + ADAPTERS[adapter]))
    else:
        patches = graphpatch.apply(
            chunks, graphpatch.parse(f"use {MAPS.get(name, 'hf_llama')}\n{FROZEN}{ADAPTERS[adapter]}")
        )
        graphpatch.load_weights(patches, base)
    for chunk in chunks:
        fill(chunk, lambda n: "lora" in n or (adapter == "norms" and "layernorm" in n))
    graphpatch.to_peft(patches, folder)
    if len(chunks) > 1 or not (chunks[0].pre_process and chunks[0].post_process):
        return None
    with torch.no_grad():
        return chunks[0].eval()(IDS, torch.arange(12).expand(2, 12), None)


def loaded(base: str, use: str = "use hf_llama") -> Any:
    """The parameters of the whole model that this rank's chunks have a part in, whole, by their global names."""
    chunks = chunks_of(**OURS)
    patches = graphpatch.apply(chunks, graphpatch.parse(f"{use}\n{ADAPTERS['lora']}"))
    graphpatch.load_weights(patches, base)
    return {global_name(c, n): gathered(p, p.data) for c in chunks for n, p in c.named_parameters() if "lora" not in n}


def test_virtual_chunks_have_the_weights_of_their_layers(tmp_path):
    made("llama").save_pretrained(tmp_path)
    whole = one(loaded, str(tmp_path))
    parts = ranks(loaded, str(tmp_path), pp=2, vpp=2)
    assert {name for part in parts for name in part} == set(whole)
    assert all(torch.equal(value, whole[name]) for part in parts for name, value in part.items())


@pytest.mark.parametrize("layout", [{}, {"tp": 2}], ids=str)
def test_a_padded_vocabulary(tmp_path, layout):
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(LlamaConfig(**{**SIZES, "vocab_size": 90}))
    theirs.save_pretrained(tmp_path)
    padded = "use hf_llama(vocab_size=90, padded_vocab_size=96)"
    for found in ranks(loaded, str(tmp_path), padded, **layout):
        for name, own in (("embedding.word_embeddings", theirs.model.embed_tokens), ("output_layer", theirs.lm_head)):
            assert torch.equal(found[f"{name}.weight"][:90], own.weight) and not found[f"{name}.weight"][90:].any()
    with pytest.raises(AssertionError, match="GP662"):
        ranks(loaded, str(tmp_path), **layout)
    with pytest.raises(AssertionError, match="there are 90 rows, and not the 80"):
        ranks(loaded, str(tmp_path), padded.replace("90", "80"), **layout)


@pytest.mark.parametrize(
    ("name", "adapter", "layout"),
    [
        ("llama", "lora", {"tp": 2, "pp": 2}),
        ("llama", "dora", {"tp": 2}),
        ("llama", "parts", {"tp": 2, "pp": 2}),
        ("llama", "lora", {"pp": 2, "vpp": 2}),
        ("llama", "norms", {"tp": 2, "pp": 2}),
        ("llama", "vocabulary", {"tp": 2, "pp": 2}),
        ("mistral", "lora", {}),
        ("mixtral", "lora", {}),
        ("mixtral", "experts", {"dp": 2, "ep": 2}),
        ("mixtral", "lora", {"tp": 2, "etp": 2}),
        ("qwen2", "lora", {"tp": 2}),
        ("qwen3", "lora", {"pp": 2}),
        ("gemma", "lora", {"tp": 2}),
        ("gemma2", "lora", {"tp": 2, "pp": 2}),
    ],
    ids=str,
)
def test_peft_computes_the_same(tmp_path, name, adapter, layout):
    model = made(name)
    model.save_pretrained(tmp_path / "base")
    found = ranks(exported, name, str(tmp_path / "base"), adapter, str(tmp_path / "adapter"), **layout)
    alone = ranks(exported, name, str(tmp_path / "base"), adapter, str(tmp_path / "again"))[0]
    if adapter != "parts":  # whose factors the harness fills by the order of rows that ranks have
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            assert (tmp_path / "adapter" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    with torch.no_grad():
        bare = model(IDS).logits
        theirs = PeftModel.from_pretrained(model, tmp_path / "again").eval()(IDS).logits
    assert (theirs - bare).abs().max() > 0.05
    close = 1e-5 * theirs.abs().max().item()  # float32's noise is that of the largest, 10 and more
    for here in (alone, *found):
        if here is not None:
            torch.testing.assert_close(here, theirs, rtol=1e-5, atol=close)


@pytest.mark.parametrize(
    ("rules", "why"),
    [
        ("patch linear_fc1 with lora(rank=4)", "has none for w2"),
        ("patch local_experts[0].linear_fc2 with lora(rank=4)", "some of them have no adapter"),
        ("patch local_experts[*].linear_fc2 with lora(rank=4, dora=true)", "no DoRA on experts"),
        (
            "patch ^decoder.layers[0].**.linear_fc2 with lora(rank=4)\n"
            "patch ^decoder.layers[1].**.linear_fc2 with lora(rank=2)",
            "one rank and one scale",
        ),
    ],
)
def test_what_peft_would_misread_of_experts_is_refused(tmp_path, monkeypatch, rules, why):
    made("mixtral").save_pretrained(tmp_path / "base")
    monkeypatch.setitem(ADAPTERS, "odd", rules)
    with pytest.raises(AssertionError, match=f"GP625[^$]*{why}"):
        ranks(exported, "mixtral", str(tmp_path / "base"), "odd", str(tmp_path / "adapter"))
    assert not (tmp_path / "adapter").exists()
