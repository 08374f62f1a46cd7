"""Checkpoints that PEFT reads too."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel

import graphpatch
from graphpatch.transformers import AdapterCheckpoint

from .common import KINDS, LORA, data, llama, losses, patched, trainer


@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_a_checkpoint(kind, tmp_path):
    model, patch = patched(kind)
    run = trainer(model, tmp_path, AdapterCheckpoint(patch, peft=True), max_steps=4)
    run.train()
    ids = torch.stack([row["input_ids"] for row in data(model, 2)])
    base = KINDS[kind][0]().eval()
    plain = base(input_ids=ids).logits.detach()
    theirs = PeftModel.from_pretrained(base, str(tmp_path / "checkpoint-4")).eval()(input_ids=ids).logits
    assert not torch.allclose(theirs, plain, atol=1e-3)
    torch.testing.assert_close(theirs, model.eval()(input_ids=ids).logits, atol=1e-6, rtol=1e-6)

    # PEFT's files in the folder change nothing for a run that goes on from there.
    other, again = patched(kind)
    resumed = trainer(other, tmp_path / "again", AdapterCheckpoint(again, peft=True), max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(resumed) == losses(run)


def test_what_peft_cannot_express_is_refused_before_anything_trains(tmp_path):
    model, patch = patched("llama", LORA + "\npatch embed_tokens with scale.output(2.0)")
    with pytest.raises(graphpatch.Error) as caught:
        AdapterCheckpoint(patch, peft=True)
    assert caught.value.code == "GP625"
    trainer(model, tmp_path, AdapterCheckpoint(patch), max_steps=2).train()


@pytest.mark.parametrize("peft", [False, True])
def test_the_weights_of_a_model_are_not_replaced(peft, tmp_path):
    llama().save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    model, patch = patched()
    AdapterCheckpoint(patch, peft=peft)
    with pytest.raises(graphpatch.Error) as caught:
        model.save_pretrained(tmp_path)
    assert caught.value.code == "GP658"
    assert (tmp_path / "model.safetensors").read_bytes() == before and not (tmp_path / "adapter.json").exists()
