"""`layers.drop`, against models that were built without those layers."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
)

from ..patch.common import patch, refused, state

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 64, "pad_token_id": 0}
IDS = torch.arange(1, 25).reshape(2, 12)


def made(kind: str, layers: int, **options: Any) -> Any:
    torch.manual_seed(layers)
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=layers, n_head=4, vocab_size=64)).eval()
    if kind == "gpt_neo":  # whose attention calls its place `layer_id`
        kinds = options.get("layer_types", [("global", "local")[i % 2] for i in range(layers)])
        sizes = {"hidden_size": 32, "num_layers": layers, "num_heads": 4, "vocab_size": 64, "window_size": 4}
        return GPTNeoForCausalLM(GPTNeoConfig(**sizes, attention_types=[[kinds, 1]])).eval()
    if kind == "bert":
        return BertForMaskedLM(BertConfig(**SIZES, num_hidden_layers=layers)).eval()
    sizes = {**SIZES, "num_key_value_heads": 2, "num_hidden_layers": layers, "head_dim": 8, **options}
    if kind == "gemma2":
        return Gemma2ForCausalLM(Gemma2Config(**sizes, sliding_window=4, attn_implementation="eager")).eval()
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval()


def without(model: Any, small: Any, kept: list[int]) -> None:
    """Give `small` the weights of the layers that are kept."""
    place = {old: new for new, old in enumerate(kept)}
    found = {}
    for key, value in model.state_dict().items():
        number = re.search(r"\.(?:layers|layer|h)\.(\d+)\.", key)
        if number is None:
            found[key] = value
        elif int(number[1]) in place:
            found[key[: number.start(1)] + str(place[int(number[1])]) + key[number.end(1) :]] = value
    small.load_state_dict(found)


def kinds_of(model: Any) -> list[str]:
    """What each layer attends to, in a family with several kinds."""
    return getattr(model.config, "layer_types", None) or model.config.attention_layers


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "gpt_neo", "bert"])
def test_what_is_left_is_a_model_of_that_many_layers(kind):
    model = made(kind, 5)
    kept = [1, 2, 4]
    options = {"layer_types": [kinds_of(model)[i] for i in kept]} if kind in ("gemma2", "gpt_neo") else {}
    small = made(kind, 3, **options)
    without(model, small, kept)
    before, plain, keys = state(model), model(IDS).logits, list(model.state_dict())
    dropped = patch(model, "use roles\npatch @layers with layers.drop([0, -2]) expect 1")
    assert torch.equal(model(IDS).logits, small(IDS).logits)
    assert list(model.state_dict()) == keys and model.config.num_hidden_layers == 3
    if kind != "bert":
        generation = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(model.generate(IDS, **generation), small.generate(IDS, **generation))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(IDS).logits, small(IDS).logits)
    with dropped.disabled():
        assert torch.equal(model(IDS).logits, plain)
    lora = patch(model, "use roles\npatch @layers[1].**.@attention_linears with lora(rank=2)")
    assert all(".1." in change.path for change in lora.changes)  # indices are the original ones
    lora.revert()
    dropped.revert()
    assert state(model) == before and torch.equal(model(IDS).logits, plain) and model.config.num_hidden_layers == 5


def test_containers_of_any_model():
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    x = torch.randn(2, 4)
    wanted = net[3](net[0](x))
    model = nn.ModuleDict({"layers": net})
    dropped = patch(model, "patch layers with layers.drop([1, 2])")
    assert torch.equal(net(x), wanted) and len(net) == 2
    dropped.revert()
    assert len(net) == 4
    refused("GP580", model, "patch layers with layers.drop([4])")
    refused("GP580", model, "patch layers with layers.drop([0, 1, 2, 3])")
    refused("GP580", model, "patch layers with layers.drop([0, -4])")
    refused("GP410", model, "patch layers with layers.drop([1, 1])")
    refused("GP204", model, "patch layers with layers.drop([])")
    refused("GP410", model, "patch layers[0] with layers.drop([1])")


def test_a_config_that_computes_the_kinds_of_layers_is_told():
    sizes = {**SIZES, "num_hidden_layers": 6, "num_key_value_heads": 1, "lru_width": 32}
    model = RecurrentGemmaForCausalLM(RecurrentGemmaConfig(**sizes)).eval()
    for op in ("layers.drop([1])", "layers.repeat([[0, 2], [1, 6]])"):
        told = refused("GP580" if "drop" in op else "GP581", model, f"patch ^model.layers with {op}")
        assert "computes `layers_block_type`" in told
    patch(model, "patch ^model.layers with layers.drop([3, 4, 5])")
    generation = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(IDS, **generation)
    assert torch.equal(cached, model.generate(IDS, **generation, use_cache=False))
