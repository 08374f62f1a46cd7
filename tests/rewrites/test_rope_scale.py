"""`rope.scale` against modules that Transformers builds from a config which says the same."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    DeepseekV3Config,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    Phi3Config,
    Qwen3VLTextConfig,
)
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssRotaryEmbedding
from transformers.models.modernbert.modeling_modernbert import ModernBertRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

import graphpatch

from ..patch.common import patch, refused, state

IDS = torch.arange(24).reshape(2, 12)
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 8, "pad_token_id": 0,
}  # fmt: skip
SHORT, LONG = [1.0, 1.5, 2.0, 2.5], [2.0, 4.0, 8.0, 16.0]


def test_longrope_is_transformers_own_short_and_long():
    theirs = {"rope_type": "longrope", "factor": 4.0, "rope_theta": 1e4, "short_factor": SHORT, "long_factor": LONG}
    config = LlamaConfig(**SIZES, rope_parameters={**theirs, "original_max_position_embeddings": 8})
    torch.manual_seed(0)
    wanted = LlamaForCausalLM(config).eval()
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    model.load_state_dict(wanted.state_dict())
    before, plain = state(model), model(IDS).logits
    factors = f"short_factor={SHORT}, long_factor={LONG}"
    made = patch(model, f'patch rotary_emb with rope.scale("longrope", 4.0, {factors})')
    for ids in (IDS[:, :6], IDS, IDS[:, :8]):
        assert torch.equal(model(ids).logits, wanted(ids).logits)
    assert torch.equal(copy.deepcopy(model)(IDS).logits, wanted(IDS).logits)
    assert not torch.equal(model(IDS).logits, plain)
    made.revert()
    assert state(model) == before
    refused(
        "GP564", model, f'patch rotary_emb with rope.scale("longrope", 4.0, short_factor=[1.0], long_factor={LONG})'
    )
    refused("GP204", model, f'patch rotary_emb with rope.scale("longrope", 4.0, short_factor={SHORT})')
    refused(
        "GP204", model, f'patch rotary_emb with rope.scale("longrope", 4.0, short_factor=[0.0], long_factor={LONG})'
    )


def test_gemma_3_is_stretched_where_it_attends_to_the_whole_text():
    def built(**full: Any) -> Gemma3ForCausalLM:
        torch.manual_seed(0)
        sets = {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "default", "rope_theta": 1e6, **full},
        }
        kinds = ["sliding_attention", "full_attention"]
        return Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, layer_types=kinds, rope_parameters=sets)).eval()

    wanted, model = built(rope_type="linear", factor=8.0), built()
    plan = graphpatch.parse('patch rotary_emb with rope.scale("linear", 8.0)').plan(model)
    assert "linear Gemma3RotaryEmbedding (full_attention)" in str(plan)
    before, plain = state(model), model(IDS).logits
    made = plan.apply(model)
    assert torch.equal(model(IDS).logits, wanted(IDS).logits) and not torch.equal(model(IDS).logits, plain)
    made.revert()
    assert state(model) == before
    told = refused("GP564", model, 'patch rotary_emb with rope.scale("linear", 8.0, layer_type="global")')
    assert '"sliding_attention", "full_attention"' in told
    llama = LlamaForCausalLM(LlamaConfig(**SIZES))
    refused("GP564", llama, 'patch rotary_emb with rope.scale("linear", 8.0, layer_type="full_attention")')


MROPE = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [8, 4, 4], "mrope_interleaved": True}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
ROTARIES: dict[str, tuple[type, Any, str, dict[str, Any]]] = {
    # What the rule does not say of a set of the same kind stays: gpt-oss says truncate=false, and an original length.
    "gpt-oss": (
        GptOssRotaryEmbedding,
        GptOssConfig(),
        'rope.scale("yarn", 64.0)',
        {**GptOssConfig().rope_parameters, "factor": 64.0},
    ),
    "partial": (
        Phi3RotaryEmbedding,
        Phi3Config(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        'rope.scale("yarn", 4.0, original=512)',
        {**YARN, "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    ),
    "several axes": (
        Qwen3VLTextRotaryEmbedding,
        Qwen3VLTextConfig(head_dim=32, rope_parameters=MROPE),
        'rope.scale("yarn", 4.0, original=512)',
        {**MROPE, **YARN},
    ),
}


@pytest.mark.parametrize("name", ROTARIES)
def test_what_is_not_said_stays(name):
    cls, config, op, theirs = ROTARIES[name]
    model = nn.ModuleDict({"rotary_emb": cls(config=config)})
    patch(model, f"patch rotary_emb with {op}")
    other = copy.deepcopy(config)
    other.rope_parameters = theirs
    if getattr(other, "original_max_position_embeddings", None) is not None and "original" in op:
        other.original_max_position_embeddings = 512  # Phi 3 reads it there
    wanted, found = cls(config=other), model["rotary_emb"]
    assert found.attention_scaling == wanted.attention_scaling != 1.0
    assert getattr(found, "mrope_section", None) == getattr(wanted, "mrope_section", None)
    assert [n for n, _ in found.named_buffers()] == [n for n, _ in wanted.named_buffers()]
    assert all(map(torch.equal, found.buffers(), wanted.buffers()))
    assert not torch.equal(found.inv_freq, cls(config=config).inv_freq)


def test_encoders_with_windows():
    model = nn.ModuleDict({"rotary_emb": ModernBertRotaryEmbedding(config=ModernBertConfig())})
    patch(model, 'patch rotary_emb with rope.scale("linear", 2.0)')
    plain = ModernBertRotaryEmbedding(config=ModernBertConfig())
    assert torch.equal(model["rotary_emb"].full_attention_inv_freq, plain.full_attention_inv_freq / 2)
    assert torch.equal(model["rotary_emb"].sliding_attention_inv_freq, plain.sliding_attention_inv_freq)


def test_what_is_built_into_the_attention_too_is_refused():
    yarn = {**YARN, "rope_theta": 1e4, "mscale": 1.0, "mscale_all_dim": 1.0}
    model = nn.ModuleDict({"rotary_emb": DeepseekV3RotaryEmbedding(config=DeepseekV3Config(rope_parameters=yarn))})
    told = refused("GP564", model, 'patch rotary_emb with rope.scale("yarn", 8.0)')
    assert "mscale_all_dim" in told and "build the model from a config" in told
