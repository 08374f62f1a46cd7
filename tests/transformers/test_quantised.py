"""A quantised base, as `from_pretrained` makes it, trains, resumes and is left as it was."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, TorchAoConfig

import graphpatch
from graphpatch.transformers import AdapterCheckpoint

from .common import LORA, llama, losses, trainer

IDS = torch.tensor([[1, 2, 3]])


@pytest.fixture
def quantised(tmp_path):
    llama().save_pretrained(tmp_path / "base")

    def load():
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=TorchAoConfig(Int8WeightOnlyConfig())
        )

    return load


def test_a_quantised_base_trains_and_resumes(quantised, tmp_path):
    model = quantised()
    plain = model(IDS).logits
    patch = graphpatch.apply(model, graphpatch.parse(LORA))
    run = trainer(model, tmp_path / "whole", AdapterCheckpoint(patch))
    run.train()
    assert all(value.any() for name, value in patch.adapter_state_dict().items() if "lora_B" in name)
    saved = load_file(tmp_path / "whole" / "checkpoint-6" / "model.safetensors")
    assert saved.keys() - {"graphpatch.changes"} == patch.adapter_state_dict().keys()

    other = quantised()
    again = trainer(other, tmp_path / "cut", AdapterCheckpoint(graphpatch.apply(other, graphpatch.parse(LORA))))
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert losses(again) == losses(run)

    # Also onto a base of another precision.
    graphpatch.load_adapter(llama(), tmp_path / "whole" / "checkpoint-6")
    patch.revert()
    assert torch.equal(model.eval()(IDS).logits, plain)


def test_it_is_admitted_only_while_its_trainer_is_made(quantised, tmp_path):
    model = quantised()
    with pytest.raises(ValueError, match="purely quantized"):
        trainer(model, tmp_path)
    patch = graphpatch.apply(model, graphpatch.parse(LORA))
    with pytest.raises(ValueError, match="purely quantized"):
        trainer(model, tmp_path)
    callback = AdapterCheckpoint(patch)
    assert model._hf_peft_config_loaded is True
    trainer(model, tmp_path, callback)
    assert model._hf_peft_config_loaded is False
    # A notebook's cell runs twice.
    trainer(model, tmp_path, AdapterCheckpoint(patch))
    callback.detach()
    with pytest.raises(ValueError, match="purely quantized"):
        trainer(model, tmp_path)


def test_a_quantisation_without_gradients_is_refused():
    model = llama()
    patch = graphpatch.apply(model, graphpatch.parse(LORA))
    model.hf_quantizer = SimpleNamespace(is_trainable=False, quantization_config=SimpleNamespace(quant_method="gptq"))
    with pytest.raises(graphpatch.Error, match="quantised by gptq") as caught:
        AdapterCheckpoint(patch)
    assert caught.value.code == "GP653"
