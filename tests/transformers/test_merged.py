"""The whole model, merged, as `from_pretrained` reads it."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import graphpatch
from graphpatch.transformers import AdapterCheckpoint, save_merged
from tests.patch.common import randomise, state

from .common import KINDS, LORA, data, gpt2, llama, patched, trainer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attached", [False, True])
def test_a_merged_model_is_read_by_from_pretrained(kind, attached, tmp_path, caplog):
    model, patch = patched(kind)
    randomise(patch)
    ids = torch.stack([row["input_ids"] for row in data(model, 2)])
    expected = model.eval()(input_ids=ids).logits
    if attached:
        AdapterCheckpoint(patch)
    before = state(model)
    save_merged(model, tmp_path)
    assert state(model) == before
    with caplog.at_level("WARNING"):
        merged = type(model).from_pretrained(tmp_path)
    assert "UNEXPECTED" not in caplog.text and "MISSING" not in caplog.text
    assert not graphpatch.patches(merged)
    torch.testing.assert_close(merged(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)


def test_while_merged_the_model_saves_itself_whole(tmp_path):
    model, patch = patched()
    randomise(patch)
    run = trainer(model, tmp_path, AdapterCheckpoint(patch))
    patch.merge()
    with pytest.raises(graphpatch.Error, match="unmerge") as caught:
        run.train()
    assert caught.value.code == "GP657"
    run.save_model(str(tmp_path / "merged"))
    assert patch.merged and load_file(tmp_path / "merged" / "model.safetensors").keys() == llama().state_dict().keys()
    patch.unmerge()
    run.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "adapter.json").exists()


def test_baked_it_is_a_model_like_any_other(tmp_path):
    model, patch = patched()
    randomise(patch)
    AdapterCheckpoint(patch)
    patch.bake()
    assert type(model) is type(llama()) and not [key for key in vars(model) if "graphpatch" in key]
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == llama().state_dict().keys()


def test_what_is_no_change_of_weights_is_refused_and_nothing_changes(tmp_path):
    model = llama()
    first = graphpatch.apply(model, graphpatch.parse(LORA))
    randomise(first)
    graphpatch.apply(model, graphpatch.parse("patch embed_tokens with scale.output(2.0)\nfreeze ** except @new"))
    before = state(model)
    with pytest.raises(graphpatch.ApplyError):
        save_merged(model, tmp_path)
    assert state(model) == before and not list(tmp_path.iterdir())
    with pytest.raises(graphpatch.Error) as caught:
        save_merged(nn.Linear(2, 2), tmp_path)
    assert caught.value.code == "GP656"


def test_two_adapters_are_merged_together(tmp_path):
    model = gpt2().eval()
    for name in ("a", "b"):
        rules = graphpatch.parse("patch c_attn with lora(rank=2)\nfreeze ** except @new")
        randomise(graphpatch.apply(model, rules, adapter=name))
    ids = torch.tensor([[1, 2, 3]])
    expected = model(ids).logits
    save_merged(model, tmp_path)
    assert torch.equal(model(ids).logits, expected)
    torch.testing.assert_close(type(model).from_pretrained(tmp_path)(ids).logits, expected, atol=1e-5, rtol=1e-5)
