"""`embedding.resize`, against Transformers' own `resize_token_embeddings`."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import graphpatch

from ..patch.common import patch, refused, state

OLD, NEW = 64, 70
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": OLD, "num_hidden_layers": 2,
    "pad_token_id": 3, "eos_token_id": 2, "bos_token_id": 1,
}  # fmt: skip
RULE = "use roles\npatch @embed with embedding.resize(len=70{})"


def made(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "gpt2":
        config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=OLD, eos_token_id=2, bos_token_id=1)
        return GPT2LMHeadModel(config).eval()
    if kind == "bert":
        model: Any = BertForMaskedLM(BertConfig(**SIZES)).eval()
        return model
    if kind == "t5":
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": OLD}
        return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()
    if kind == "gemma3":
        return Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, head_dim=8, num_key_value_heads=2)).eval()
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=kind == "llama")).eval()


def longer(model: Any, new: graphpatch.Patch) -> Any:
    """Transformers' own, with the same new rows."""
    other = copy.deepcopy(model)
    other.resize_token_embeddings(NEW, mean_resizing=False)
    rows = new.adapter_state_dict()
    with torch.no_grad():
        other.get_input_embeddings().weight[OLD:] = rows["new_tokens.weight"]
        if "new_tokens.head_weight" in rows:
            other.get_output_embeddings().weight[OLD:] = rows["new_tokens.head_weight"]
    return other


@pytest.mark.parametrize("kind", ["llama", "untied", "gemma3", "gpt2", "bert", "t5"])
def test_as_transformers_resizes(kind):
    model = made(kind)
    original, before, keys = copy.deepcopy(model), state(model), set(model.state_dict())
    head = ', head="lm_head"' if kind == "untied" else ""
    resized = patch(model, RULE.format(f', init="normal", train="all"{head}'))
    other = longer(original, resized)
    assert set(model.state_dict()) - keys == set(resized.adapter_state_dict())
    assert model.config.vocab_size == other.config.vocab_size == NEW
    assert model.get_input_embeddings().num_embeddings == NEW == model.get_output_embeddings().out_features
    torch.manual_seed(1)
    ids = torch.randint(4, NEW, (2, 12))
    ids[:, 3] = NEW - 1
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    ours, theirs = (m(input_ids=ids, attention_mask=mask, labels=ids) for m in (model, other))
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.loss, theirs.loss)
    ours.loss.backward()
    theirs.loss.backward()
    wanted = other.get_input_embeddings().weight.grad
    torch.testing.assert_close(model.get_parameter("new_tokens.weight").grad, wanted[OLD:], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(model.get_input_embeddings().weight.grad, wanted[:OLD], rtol=1e-4, atol=1e-6)
    if kind == "untied":
        wanted = other.lm_head.weight.grad
        torch.testing.assert_close(model.get_parameter("new_tokens.head_weight").grad, wanted[OLD:])
        torch.testing.assert_close(model.lm_head.weight.grad, wanted[:OLD])
    for other_name, parameter in other.named_parameters():
        if parameter.shape[0] != NEW:
            torch.testing.assert_close(model.get_parameter(other_name).grad, parameter.grad, rtol=1e-4, atol=1e-6)
    if kind in ("llama", "untied", "gpt2", "t5"):
        options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": mask, "pad_token_id": 3}
        assert torch.equal(model.generate(ids, **options), other.generate(ids, **options))
    with torch.no_grad():
        plain = model(input_ids=ids, attention_mask=mask, labels=ids).logits
        for each in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(each(input_ids=ids, attention_mask=mask, labels=ids).logits, plain)
    model.zero_grad()
    with resized.disabled(), torch.no_grad():
        known = ids.clamp(max=OLD - 1)
        off = model(input_ids=known, labels=known).logits
        assert torch.equal(off, original(input_ids=known, labels=known).logits)
    resized.revert()
    assert state(model) == before


def test_starts_and_what_trains(tmp_path):
    model = made("llama")
    base = model.get_input_embeddings().weight
    resized = patch(model, "use roles\npatch @embed with embedding.extend(6)")
    rows = model.get_parameter("new_tokens.weight")
    torch.testing.assert_close(rows.detach(), base.detach().mean(0).expand(6, -1))
    assert rows.requires_grad and not base.requires_grad and model.lm_head.weight is base
    assert model.model.embed_tokens.padding_idx == 3
    resized.revert()
    assert base.requires_grad
    resized = patch(model, RULE.format(', init="zeros"') + "\nfreeze ** except @new")
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["new_tokens.weight"]
    ids = torch.full((1, 5), 69)
    optimizer = torch.optim.SGD(resized.trainable_parameters(), lr=0.5)
    kept = base.detach().clone()
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    assert torch.equal(base, kept) and model.get_parameter("new_tokens.weight").abs().sum() > 0
    graphpatch.save_adapter(resized, tmp_path / "a")
    again = made("llama")
    graphpatch.load_adapter(again, tmp_path / "a")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    resized.revert()
    none = patch(model, RULE.format(', train="none"'))
    assert not model.get_parameter("new_tokens.weight").requires_grad and not base.requires_grad
    none.revert()
    trained = patch(model, RULE.format("") + "\ntrain @embed")
    assert base.requires_grad
    trained.revert()
    assert base.requires_grad


def test_adapters_beside_it_add_to_the_rows_of_the_base():
    model, ids = made("untied").to(torch.bfloat16), torch.tensor([[5, 69, 7, 64]])
    both = patch(
        model, RULE.format(', head="lm_head"') + "\npatch @embed with lora(rank=2, alpha=2)\nfreeze ** except @new"
    )
    with torch.no_grad():
        for name, value in both.adapter_state_dict().items():
            if "lora" in name:
                value.normal_()
    embed = model.get_input_embeddings()
    got = embed(ids)[0]
    assert got.dtype == torch.bfloat16 and torch.equal(got[1], model.get_parameter("new_tokens.weight")[5])
    added = embed.lora_B.float() @ embed.lora_A[:, 5].float()
    torch.testing.assert_close(got[0].float(), embed.weight[5].float() + added, rtol=0.02, atol=0.02)
    assert model(ids).logits.shape == (1, 4, NEW)


def test_plain_modules_and_refusals():
    class Plain(nn.Module):
        def __init__(self, tied: bool):
            super().__init__()
            self.tok = nn.Embedding(OLD, 8, padding_idx=0)
            self.out = nn.Linear(8, OLD)
            if tied:
                self.out.weight = self.tok.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.out(self.tok(ids))

    ids = torch.tensor([[0, 3, 69]])
    tied = Plain(True)
    patch(tied, "patch tok with embedding.resize(len=70)")
    new = tied.get_parameter("new_tokens.weight")
    full = torch.cat((tied.tok.weight, new))
    bias = torch.cat((tied.out.bias, tied.out.bias.mean().expand(6)))
    torch.testing.assert_close(tied(ids), full[ids] @ full.T + bias)
    compiled = torch.compile(tied, backend="eager", fullgraph=True)
    assert torch.equal(compiled(ids), tied(ids))
    with pytest.raises(IndexError):
        tied(torch.tensor([[70]]))

    text = refused("GP481", Plain(False), "patch tok with embedding.resize(len=70)")
    assert 'head="out"' in text and 'head="none"' in text
    refused("GP481", Plain(False), 'patch tok with embedding.resize(len=70, head="tok")')
    refused("GP481", Plain(False), 'patch tok with embedding.resize(len=70, head="lm_head")')
    refused("GP481", Plain(True), 'patch tok with embedding.resize(len=70, head="out")')
    refused("GP480", Plain(True), "patch tok with embedding.resize(len=64)")
    refused("GP480", Plain(True), "patch tok with embedding.resize(len=8)")
    refused("GP410", Plain(True), "patch out with embedding.resize(len=70)")
    refused("GP480", nn.Sequential(nn.Embedding(8, 4, max_norm=1.0)), "patch :Embedding with embedding.extend(2)")
    left = Plain(False)
    patch(left, 'patch tok with embedding.resize(len=70, head="none")')
    assert left(ids).shape == (1, 3, OLD)

    with torch.device("meta"):
        meta = Plain(True)
    patch(meta, "patch tok with embedding.resize(len=70)")
    assert meta.get_parameter("new_tokens.weight").is_meta
    assert meta(ids.to("meta")).shape == (1, 3, NEW)
