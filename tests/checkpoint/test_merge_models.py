"""Merging on disk for models of transformers, whose files have names and shapes of their own."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import graphpatch
from graphpatch.checkpoint.merging import converted
from tests.patch.common import patch, randomise

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
EXPERTS = "patch {gate_up,down}_proj:Parameter with lora(rank=2)\nfreeze ** except @new"
ATTENTION = "patch self_attn.*:Linear with lora(rank=4, alpha=2)\nfreeze ** except @new"

MODELS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)),
    "tied": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "mixtral": lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, num_local_experts=4)),
    "qwen3 moe": lambda: transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SIZES, **MOE)),
    "gpt-oss": lambda: transformers.GptOssForCausalLM(
        transformers.GptOssConfig(**SIZES, num_local_experts=4, head_dim=8)
    ),
    "deepseek v3": lambda: transformers.DeepseekV3ForCausalLM(
        transformers.DeepseekV3Config(
            **{**SIZES, "num_key_value_heads": 4},
            n_routed_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            first_k_dense_replace=1,
            n_group=2,
            topk_group=1,
            q_lora_rank=8,
            kv_lora_rank=8,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=8,
        )
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=99)
    ),
    "nomic bert": lambda: transformers.NomicBertModel(
        transformers.NomicBertConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=99
        )
    ),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=99)
    ),
}


def saved(folder: Path, name: str, text: str, **options: Any) -> nn.Module:
    """The base and an adapter in `folder`; returns the model, merged in memory."""
    torch.manual_seed(0)
    model = MODELS[name]().bfloat16()
    model.save_pretrained(folder / "base", **options)
    made = patch(model, text)
    randomise(made)
    graphpatch.save_adapter(made, folder / "adapter")
    made.bake()
    return model


def loaded(folder: Path, model: nn.Module) -> dict[str, torch.Tensor]:
    return type(model).from_pretrained(folder, dtype=torch.bfloat16).state_dict()


def unequal(folder: Path, model: nn.Module) -> list[str]:
    found, want = loaded(folder, model), model.state_dict()
    assert found.keys() == want.keys()
    return [name for name in want if not torch.equal(found[name], want[name])]


@pytest.mark.parametrize(
    ("name", "text", "options"),
    [
        (
            "llama",
            "patch :Linear with lora(rank=4)\ntrain :*Norm\nfreeze ** except @new | :*Norm",
            {"max_shard_size": "30KB"},
        ),
        ("tied", "patch layers[*].**:Linear with lora(rank=4)\nfreeze ** except @new", {}),
        ("mixtral", ATTENTION, {}),
        ("mixtral", EXPERTS, {"max_shard_size": "30KB"}),
        ("qwen3 moe", ATTENTION, {}),
        ("qwen3 moe", EXPERTS, {}),
        ("gpt-oss", EXPERTS, {}),
        ("deepseek v3", "patch {gate,up,down}_proj:Linear with lora(rank=2)\n" + EXPERTS, {}),
        ("gpt2", "patch c_attn with lora(rank=2, dora=true)\nfreeze ** except @new", {}),
        ("nomic bert", "patch {q,v}_proj with lora(rank=2)\nfreeze ** except @new", {}),
        ("nomic bert", "patch k_proj with lora(rank=2, dora=true)\nfreeze ** except @new", {}),
        ("t5", "patch {q,v} with lora(rank=2)\nfreeze ** except @new", {}),
    ],
)
def test_from_pretrained_reads_the_merged_model(tmp_path, name, text, options):
    model = saved(tmp_path, name, text, **options)
    base = loaded(tmp_path / "base", model)
    graphpatch.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert unequal(tmp_path / "out", model) == []
    changed = sum(not torch.equal(base[key], tensor) for key, tensor in model.state_dict().items())
    assert changed >= 2
    names = [set().union(*(load_file(f) for f in (tmp_path / d).glob("*.safetensors"))) for d in ("base", "out")]
    assert names[0] == names[1]


def test_an_expert_is_in_the_file_that_holds_it(tmp_path):
    saved(tmp_path, "mixtral", EXPERTS)
    graphpatch.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    base, out = (load_file(tmp_path / d / "model.safetensors") for d in ("base", "out"))
    factors = load_file(tmp_path / "adapter" / "adapter.safetensors")
    a, b = (factors[f"model.layers.1.mlp.experts.gate_up_proj_lora_{x}"] for x in "AB")
    delta = b[2] @ a[2]  # expert 2: gate, then up
    for key, rows in (("w1", delta[:48]), ("w3", delta[48:])):
        name = f"model.layers.1.block_sparse_moe.experts.2.{key}.weight"
        assert torch.equal(out[name], (base[name].float() + rows).bfloat16())
    assert torch.equal(*(t["model.layers.1.block_sparse_moe.gate.weight"] for t in (base, out)))


def test_weights_that_a_model_never_saves_are_not_missed(tmp_path):
    torch.manual_seed(0)
    sizes = {
        "d_model": 32,
        "vocab_size": 64,
        "decoder_vocab_size": 64,
        "max_position_embeddings": 16,
        "pad_token_id": 0,
    }
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": 1, f"{side}_attention_heads": 2, f"{side}_ffn_dim": 48}
    model = transformers.MarianMTModel(transformers.MarianConfig(**sizes)).eval()
    model.save_pretrained(tmp_path / "base")
    made = patch(model, "patch {q,v}_proj with lora(rank=4)\nfreeze ** except @new")
    randomise(made)
    graphpatch.save_adapter(made, tmp_path / "adapter")
    made.bake()
    graphpatch.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    found = transformers.MarianMTModel.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(value, found[name]) for name, value in model.state_dict().items())


def test_the_model_inside_has_the_names_less_a_prefix(tmp_path):
    model = saved(tmp_path, "llama", "patch layers[*].**:Linear with lora(rank=4)\nfreeze ** except @new")
    torch.manual_seed(0)
    MODELS["llama"]().bfloat16().model.save_pretrained(tmp_path / "inner")
    # The head is not there, and the adapter was made on a model that has one.
    with pytest.raises(graphpatch.Error) as caught:
        graphpatch.merge_checkpoint(tmp_path / "inner", tmp_path / "adapter", tmp_path / "out")
    assert caught.value.code == "GP642" and "lm_head.weight   missing" in str(caught.value)
    inner = transformers.LlamaModel.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    made = patch(inner, "patch layers[*].**:Linear with lora(rank=4)\nfreeze ** except @new")
    randomise(made)
    graphpatch.save_adapter(made, tmp_path / "other")
    made.bake()
    graphpatch.merge_checkpoint(tmp_path / "base", tmp_path / "other", tmp_path / "out")
    found = transformers.LlamaModel.from_pretrained(tmp_path / "out", dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(found[name], t) for name, t in inner.state_dict().items())
    assert model is not None


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {"r": 4, "target_modules": "all-linear"}),
        (
            "llama",
            {"r": 4, "target_modules": ["q_proj", "embed_tokens"], "rank_pattern": {"q_proj": 2}, "use_rslora": True},
        ),
        ("llama", {"r": 4, "target_modules": ["q_proj"], "use_dora": True, "modules_to_save": ["lm_head"]}),
        ("gpt2", {"r": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True}),
        ("mixtral", {"r": 4, "target_modules": ["q_proj", "v_proj"]}),
    ],
)
def test_adapters_of_peft_become_what_peft_makes_of_them(tmp_path, name, options):
    torch.manual_seed(0)
    model = MODELS[name]()
    model.save_pretrained(tmp_path / "base")
    theirs = peft.get_peft_model(model, peft.LoraConfig(lora_alpha=6, **options))
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if "lora_" in key or "modules_to_save" in key:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(tmp_path / "adapter")
    merged = theirs.merge_and_unload()
    graphpatch.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    found = type(model).from_pretrained(tmp_path / "out").state_dict()
    want = merged.state_dict()
    assert found.keys() == want.keys()
    for key, tensor in want.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-6, atol=1e-6)


def test_an_adapter_of_peft_needs_a_base_that_says_what_it_is(tmp_path):
    torch.manual_seed(0)
    model = MODELS["llama"]()
    model.save_pretrained(tmp_path / "base")
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    config = tmp_path / "base" / "config.json"
    said = json.loads(config.read_text())
    for content, word in (
        ("", "no config.json"),
        (json.dumps({**said, "architectures": ["NoSuchModel"]}), "NoSuchModel"),
        (json.dumps({**said, "hidden_size": "wide"}), "cannot be built"),
    ):
        config.write_text(content)
        with pytest.raises(graphpatch.Error) as caught:
            graphpatch.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
        assert caught.value.code == "GP645" and word in str(caught.value)


def qwen3_vl_moe(width: int) -> Any:
    """Whose stacks are stored the other way round, under the same names."""
    text = {**SIZES, **MOE, "head_dim": 8, "moe_intermediate_size": width}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 4, "out_hidden_size": 32,
              "deepstack_visual_indexes": [0]}  # fmt: skip
    return transformers.Qwen3VLMoeForConditionalGeneration(
        transformers.Qwen3VLMoeConfig(text_config=text, vision_config=vision)
    )


# Of one that is as high as it is wide Transformers cannot tell, and leaves it as it is.
MODELS["qwen3 vl moe"], MODELS["qwen3 vl moe, square"] = (partial(qwen3_vl_moe, width) for width in (24, 16))


def turn_stacks(base: Path) -> None:
    """Store them (experts, in, out), as Qwen does and Transformers, which reads both, does not."""
    file = base / "model.safetensors"
    tensors = load_file(file)
    turned = {key: value.mT.contiguous() if value.dim() == 3 else value for key, value in tensors.items()}
    save_file(turned, file, {"format": "pt"})


BESIDE = EXPERTS.replace("freeze ** except @new", "train **.experts.down_proj")


@pytest.mark.parametrize("text", [ATTENTION, EXPERTS, BESIDE], ids=["attention", "experts", "a base that trains"])
@pytest.mark.parametrize("published", [True, False], ids=["as published", "as saved"])
@pytest.mark.parametrize("name", ["qwen3 vl moe", "qwen3 vl moe, square"])
def test_what_is_turned_while_it_is_loaded(tmp_path, name, published, text):
    model = saved(tmp_path, name, text)
    if published and "square" not in name:
        turn_stacks(tmp_path / "base")
    graphpatch.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert unequal(tmp_path / "out", model) == []


def test_what_becomes_a_parameter_in_an_unknown_way_is_refused(tmp_path, monkeypatch):
    saved(tmp_path, "qwen3 vl moe", EXPERTS)
    turn_stacks(tmp_path / "base")
    monkeypatch.setattr(converted, "_turned", lambda *given: None)
    with pytest.raises(graphpatch.Error) as caught:
        graphpatch.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "other")
    assert caught.value.code == "GP645" and "bake" in str(caught.value) and not (tmp_path / "other").exists()


def test_a_router_that_trained_and_is_stored_turned(tmp_path):
    """Ernie 4.5 VL keeps them (in, out), and one of two under another name."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    text = {**SIZES, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": [24, 16], "rope_parameters": rope}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 4}
    config = transformers.Ernie4_5_VLMoeConfig(text_config=text, vision_config=vision)
    MODELS["ernie"] = lambda: transformers.Ernie4_5_VLMoeForConditionalGeneration(config)
    model = saved(tmp_path, "ernie", ATTENTION + "\ntrain {text,vision}_moe.gate")
    kept = load_file(tmp_path / "base" / "model.safetensors")
    assert kept["model.layers.1.mlp.gate.weight_1"].shape == (32, 4)
    graphpatch.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert unequal(tmp_path / "out", model) == []


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss", "qwen3 vl moe", "llama"])
def test_unmerging_reads_experts_from_the_files_that_hold_them(tmp_path, name):
    saved(tmp_path, name, ATTENTION if name == "llama" else EXPERTS)
    if name == "qwen3 vl moe":
        turn_stacks(tmp_path / "base")
    model = type(MODELS[name]()).from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    patched = graphpatch.load_adapter(model, tmp_path / "adapter")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    patched.merge(keep=False)
    assert any(not torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    patched.unmerge(base=tmp_path / "base")
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
