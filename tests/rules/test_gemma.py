"""A Llama changed by rules, against Transformers' Gemma and Gemma 2 with the same weights: bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

import graphpatch

from ..patch.common import patch, state

SIZES = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 96, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
    "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
CAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 40, "sliding_window": 5}
IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16], [0, 0, 0, 20, 21, 22, 23, 24, 25, 26, 27, 28]])
RIGHT = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16], [20, 21, 22, 23, 24, 25, 26, 27, 28, 0, 0, 0]])


def family(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    made: Any = GemmaForCausalLM(GemmaConfig(**SIZES))
    if name == "gemma2":
        made = Gemma2ForCausalLM(Gemma2Config(**SIZES, **CAPS))
    made.set_attn_implementation("eager")
    with torch.no_grad():
        for path, parameter in made.named_parameters():
            parameter.normal_(std=0.5 if "norm" in path else 0.3)
    return made.eval()


def llama() -> LlamaForCausalLM:
    made = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    made.set_attn_implementation("eager")
    return made


def rules(name: str) -> graphpatch.RuleSet:
    return graphpatch.load(name, **(CAPS if name == "gemma2" else {}))


RENAMED = {
    "post_attention_layernorm": "self_attn.post_norm", "pre_feedforward_layernorm": "post_attention_layernorm",
    "post_feedforward_layernorm": "mlp.post_norm",
}  # fmt: skip


def here(path: str, name: str) -> str:
    """What a parameter of the family is called in the changed Llama."""
    head, _, tail = path.rpartition(".")
    before, _, last = head.rpartition(".")
    return f"{before}.{RENAMED[last]}.{tail}" if name == "gemma2" and last in RENAMED else path


def twins(name: str, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, LlamaForCausalLM, graphpatch.Patch]:
    wanted, made = family(name).to(dtype), llama().to(dtype)
    applied = graphpatch.apply(made, rules(name))
    made.load_state_dict({here(path, name): value for path, value in wanted.state_dict().items()})
    return wanted, made, applied


BOTH = pytest.mark.parametrize("name", ["gemma", "gemma2"])


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ids", [IDS, RIGHT], ids=["left", "right"])
@pytest.mark.filterwarnings("ignore:.*freezes nothing")
def test_logits_loss_and_every_gradient(name, dtype, ids):
    wanted, made, _ = twins(name, dtype)
    outs = [m(ids, attention_mask=(ids != 0).long(), labels=ids) for m in (wanted, made)]
    assert torch.equal(outs[0].logits, outs[1].logits) and torch.equal(outs[0].loss, outs[1].loss)
    for out in outs:
        out.loss.backward()
    mine = dict(made.named_parameters())
    for path, parameter in wanted.named_parameters():
        other = mine.pop(here(path, name))
        assert torch.equal(parameter.grad, other.grad), path
        assert parameter.grad.count_nonzero() > 0
    assert not mine


@BOTH
def test_each_rule_is_needed(name):
    """The options are such that none is without effect."""
    wanted, made, applied = twins(name)
    with applied.disabled():
        assert (made(IDS).logits - wanted(IDS).logits).abs().max() > 0.1
    if name == "gemma2":
        for param, value in CAPS.items():
            other = llama()
            graphpatch.apply(other, graphpatch.load(name, **{**CAPS, param: value * 2}))
            other.load_state_dict(made.state_dict())
            assert (other(IDS).logits - wanted(IDS).logits).abs().max() > 1e-2, param


@BOTH
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_past_the_window(name, cache):
    wanted, made, _ = twins(name)
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": (IDS != 0).long()}
    if cache == "static":
        options["cache_implementation"] = "static"
    assert torch.equal(wanted.generate(IDS, **options), made.generate(IDS, **options))


@BOTH
def test_the_checkpoint_of_the_family_loads_and_is_written_back(name, tmp_path):
    wanted = family(name)
    wanted.save_pretrained(tmp_path / "theirs")
    made = llama()
    applied = graphpatch.apply(made, rules(name))
    graphpatch.load_weights(applied, tmp_path / "theirs")
    assert torch.equal(made(IDS).logits, wanted(IDS).logits)
    graphpatch.save_weights(applied, tmp_path / "ours")
    wanted.config.save_pretrained(tmp_path / "ours")
    again = type(wanted).from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    assert torch.equal(again(IDS).logits, wanted(IDS).logits)
    assert sorted(again.state_dict()) == sorted(wanted.state_dict())


@BOTH
def test_under_sdpa_and_with_checkpointing_and_lora(name):
    wanted, made, _ = twins(name)
    mask = (IDS != 0).long()
    real = mask.bool()
    wanted.set_attn_implementation("eager")
    made.set_attn_implementation("sdpa")
    a, b = (m(IDS, attention_mask=mask).logits for m in (wanted, made))
    assert torch.allclose(a[real], b[real], atol=1e-5)
    made.set_attn_implementation("eager")
    lora = patch(made, "use roles\npatch @attention_linears with lora(rank=2)\nfreeze ** except @new")
    assert torch.equal(made(IDS, attention_mask=mask).logits, a)
    made.train()
    made.gradient_checkpointing_enable()
    made(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in lora.trainable_parameters())


@BOTH
def test_revert_is_exact(name):
    made = llama()
    before, weights = state(made), {k: v.clone() for k, v in made.state_dict().items()}
    graphpatch.apply(made, rules(name)).revert()
    assert state(made) == before and all(torch.equal(v, weights[k]) for k, v in made.state_dict().items())


def test_gemma_2_itself_is_not_capped_again():
    with pytest.raises(graphpatch.Error, match="caps its scores itself, at 2"):
        graphpatch.apply(family("gemma2"), "softcap")


@BOTH
def test_from_the_meta_device_and_the_familys_files_alone(name, tmp_path):
    wanted = family(name)
    wanted.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    model.set_attn_implementation("eager")
    applied = graphpatch.apply(model, rules(name))
    assert all(p.is_meta for p in model.parameters())
    graphpatch.load_weights(applied, tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    mine, theirs = model(IDS, labels=IDS), wanted(IDS, labels=IDS)
    mine.loss.backward()
    theirs.loss.backward()
    assert torch.equal(mine.logits, theirs.logits)
    grads = {here(path, name): p.grad for path, p in wanted.named_parameters()}
    assert all(torch.equal(p.grad, grads[path]) for path, p in model.named_parameters())
    adapter = patch(model, "patch q_proj with lora(rank=2)\nfreeze ** except @new")
    assert {p.device.type for p in adapter.trainable_parameters()} == {"cpu"}
