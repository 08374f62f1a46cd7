"""Adapters that PEFT made and saved, loaded here: the same logits, and every tensor in its place."""

from __future__ import annotations

import pytest
import torch

import graphpatch
from tests.checkpoint.peft.models import (
    Attending,
    ConvNet,
    bert,
    by_peft,
    deepseek,
    gpt2,
    gpt_oss,
    llama,
    llama4,
    logits,
    mixtral,
    qwen3_moe,
    t5,
    theirs,
)

CASES = {
    "list": (llama, {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 6}),
    "list with an entry that is nowhere": (llama, {"target_modules": ["q_proj", "wqkv"], "r": 4}),
    "regex": (llama, {"target_modules": r".*\.(q|v)_proj", "r": 4}),
    "all-linear": (llama, {"target_modules": "all-linear", "r": 2}),
    "all-linear, gpt2": (gpt2, {"target_modules": "all-linear", "r": 2}),
    "by model type": (llama, {"r": 4}),
    "layers": (llama, {"target_modules": ["q_proj"], "layers_to_transform": [0, 2], "r": 4}),
    "layers by pattern": (
        gpt2,
        {"target_modules": ["c_attn"], "layers_to_transform": 1, "layers_pattern": ["layers", "h"], "r": 4},
    ),
    "patterns": (
        llama,
        {
            "target_modules": ["q_proj", "v_proj", "up_proj"],
            "rank_pattern": {"layers.0.self_attn.q_proj": 2, "up_proj": 8, "q_proj": 3},
            "alpha_pattern": {r"^model\.layers\.1\..*": 16, "v_proj": 1.5},
            "r": 4,
        },
    ),
    "exclusion": (llama, {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.1\..*", "r": 4}),
    "exclusion by list": (llama, {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["0.self_attn.q_proj"]}),
    "rsLoRA": (llama, {"target_modules": ["q_proj"], "use_rslora": True, "r": 4}),
    "DoRA": (llama, {"target_modules": ["q_proj", "down_proj"], "use_dora": True, "r": 4}),
    "DoRA, gpt2": (gpt2, {"target_modules": ["c_attn"], "use_dora": True, "r": 4}),
    "DoRA, embedding": (llama, {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True, "r": 4}),
    "DoRA, convolutions": (ConvNet, {"target_modules": ["first", "row"], "use_dora": True, "r": 4}),
    "bias of B": (gpt2, {"target_modules": ["c_attn", "c_fc"], "lora_bias": True, "r": 4}),
    "gaussian": (llama, {"target_modules": ["q_proj"], "init_lora_weights": "gaussian", "r": 4}),
    "orthogonal": (llama, {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal", "r": 4}),
    "PiSSA": (llama, {"target_modules": ["q_proj"], "init_lora_weights": "pissa", "r": 4}),
    "OLoRA": (llama, {"target_modules": ["q_proj", "down_proj"], "init_lora_weights": "olora", "r": 4}),
    "embedding": (llama, {"target_modules": ["embed_tokens", "v_proj"], "r": 4}),
    "embedding by regex": (llama, {"target_modules": r".*(embed_tokens|v_proj)", "r": 4}),
    "biases of targets": (gpt2, {"target_modules": ["c_attn"], "bias": "lora_only", "r": 4}),
    "all biases": (gpt2, {"target_modules": ["c_attn"], "bias": "all", "r": 4}),
    "head saved": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "r": 4}),
    "norms saved": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["norm"], "r": 4}),
    "classifier": (bert, {"target_modules": ["query", "value"], "task_type": "SEQ_CLS", "r": 4}),
    "classifier, all-linear": (bert, {"target_modules": "all-linear", "task_type": "SEQ_CLS", "r": 4}),
    "encoder and decoder": (t5, {"target_modules": ["q", "v", "wo"], "r": 4, "task_type": "SEQ_2_SEQ_LM"}),
    "convolutions": (ConvNet, {"target_modules": ["first", "row", "head"], "r": 4, "lora_alpha": 6}),
    "experts": (
        mixtral,
        {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "r": 4},
    ),
    "experts and attention": (
        mixtral,
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.down_proj"],
            "rank_pattern": {"experts.down_proj": 2, "q_proj": 3},
            "r": 4,
        },
    ),
    "experts, named as before Transformers 5": (mixtral, {"target_modules": ["q_proj", "w1", "w2", "w3"], "r": 4}),
    "experts, the same, qwen3": (
        qwen3_moe,
        {"target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"], "r": 4},
    ),
    "experts, gpt-oss": (
        gpt_oss,
        {"target_modules": ["v_proj"], "target_parameters": ["experts.gate_up_proj"], "r": 4},
    ),
    "experts, llama 4": (
        llama4,
        {"target_modules": ["v_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "r": 4},
    ),
    "experts, llama 4, square": (
        lambda: llama4(16),
        {"target_modules": ["v_proj"], "target_parameters": ["experts.down_proj"], "r": 4},
    ),
    "the weight of a linear": (llama, {"target_modules": [], "target_parameters": ["q_proj.weight"], "r": 4}),
    "weights of linears among experts": (
        deepseek,
        {
            "target_modules": ["o_proj"],
            "target_parameters": ["experts.down_proj", "shared_experts.up_proj.weight", "0.mlp.down_proj.weight"],
            "rank_pattern": {"down_proj.weight": 2, r"experts\.down_proj": 3},
            "r": 4,
        },
    ),
    "attention": (Attending, {"target_modules": ["attn", "head"], "r": 4}),
    "tied embedding and head": (
        lambda: llama(tie_word_embeddings=True),
        {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True, "r": 4},
    ),
    "norm of a convolution saved": (ConvNet, {"target_modules": ["first"], "modules_to_save": ["norm"], "r": 4}),
}


@pytest.mark.parametrize("case", CASES)
def test_loads_what_peft_saved(case, tmp_path):
    make, fields = CASES[case]
    model = make()
    expected = theirs(model, tmp_path, **fields)
    plain = logits(model).detach()
    assert not torch.allclose(expected, plain, atol=1e-3)
    patch = graphpatch.load_peft(model, tmp_path)
    torch.testing.assert_close(logits(model).detach(), expected, atol=1e-5, rtol=1e-5)

    # And out again, to PEFT; and by our own files.
    graphpatch.to_peft(patch, tmp_path / "out")
    torch.testing.assert_close(by_peft(make(), tmp_path / "out"), expected, atol=1e-5, rtol=1e-5)
    graphpatch.save_adapter(patch, tmp_path / "ours")
    again = make()
    graphpatch.load_adapter(again, tmp_path / "ours")
    assert torch.equal(logits(again), logits(model))
    patch.revert()
    assert torch.equal(logits(model), plain)
