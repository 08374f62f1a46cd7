"""Files that are damaged, or belong to another model: told with numbers, and the model is as it was before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import graphpatch
from tests.checkpoint.peft.models import IDS, ConvNet, bert, by_peft, llama, logits, theirs, trained
from tests.patch.common import state

FIELDS: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], "r": 4}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    theirs(llama(), tmp_path, **FIELDS)
    return tmp_path


def refused(code: str, model: nn.Module, folder: Path, **options: Any) -> str:
    before = state(model)
    with pytest.raises(graphpatch.Error) as caught:
        graphpatch.load_peft(model, folder, **options)
    assert state(model) == before and not graphpatch.patches(model)
    assert caught.value.code == code, str(caught.value)
    return str(caught.value)


def edit(folder: Path, change: Any) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({key: tensor.contiguous() for key, tensor in change(tensors).items()}, path)


def configure(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_pickled_weights_are_not_read(folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    assert "pickle" in refused("GP621", llama(), folder)


@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"\xff" * 100, lambda b: b[8:]]
)
def test_a_damaged_file(folder, damage):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    refused("GP621", llama(), folder)


def test_missing_and_unexpected_keys_are_counted(folder):
    edit(folder, lambda t: {k: v for k, v in t.items() if "layers.1" not in k})
    assert "4 tensors are missing" in refused("GP623", llama(), folder)


def test_a_key_that_reaches_nothing(folder):
    edit(folder, lambda t: {**t, "base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight": torch.zeros(4, 16)})
    text = refused("GP623", llama(), folder)
    assert "1 of 13 reach no module" in text and "layers.7" in text
    edit(folder, lambda t: {k: v for k, v in t.items() if "layers.7" not in k} | {"nonsense": torch.zeros(1)})
    assert "nonsense" in refused("GP623", llama(), folder)


def test_the_prefix_of_another_model_does_not_load_and_do_nothing(folder):
    edit(folder, lambda t: {k.replace("model.layers", "transformer.h"): v for k, v in t.items()})
    refused("GP623", ConvNet(), folder)


def test_a_model_with_fewer_layers(folder):
    model = llama(num_hidden_layers=2)
    assert "4 of 12 reach no module" in refused("GP623", model, folder)


def test_shapes(folder):
    edit(folder, lambda t: {k: v[..., :3] if "layers.1" in k else v for k, v in t.items()})
    assert "4 of 12 tensors" in refused("GP624", llama(), folder)
    edit(folder, lambda t: {k: torch.zeros(4, 16, dtype=torch.int32) if "lora_A" in k else v for k, v in t.items()})
    refused("GP624", llama(), folder)


def test_a_rank_that_is_not_the_config_s(folder):
    configure(folder, r=8)
    assert "12 of 12" in refused("GP624", llama(), folder)


def test_one_tensor_twice(folder):
    def twice(tensors):
        key = next(iter(tensors))
        return {**tensors, key.removeprefix("base_model.model."): tensors[key].clone()}

    edit(folder, twice)
    assert "twice" in refused("GP623", llama(), folder)


def test_tensors_that_are_not_finite_load_as_they_are(folder):
    edit(folder, lambda t: {k: v * float("nan") for k, v in t.items()})
    model = llama()
    graphpatch.load_peft(model, folder)
    assert logits(model).isnan().all()


def test_keys_without_a_prefix_and_of_wrapped_models(folder):
    expected = logits_of(folder)
    for wrap in ("", "base_model.model._orig_mod.", "module.", "base_model.model.module."):
        edit(folder, lambda t, wrap=wrap: {wrap + plain(k): v for k, v in t.items()})
        torch.testing.assert_close(logits_of(folder), expected)
    named = {".lora_A.weight": ".lora_A.default.weight", ".lora_B.weight": ".lora_B.default.weight"}
    edit(folder, lambda t: {k.replace(*next(p for p in named.items() if k.endswith(p[0]))): v for k, v in t.items()})
    torch.testing.assert_close(logits_of(folder), expected)


def plain(key: str) -> str:
    for part in ("base_model.model.", "_orig_mod.", "module."):
        key = key.removeprefix(part)
    return key


def logits_of(folder: Path) -> torch.Tensor:
    model = llama()
    graphpatch.load_peft(model, folder)
    return logits(model).detach()


def test_a_backbone_inside_a_model_and_a_model_inside_another(tmp_path):
    model = llama()
    patch = trained(model.model, "patch {q,v}_proj with lora(rank=4)\nfreeze ** except @new")
    expected = logits(model).detach()
    graphpatch.to_peft(patch, tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors")
    assert all(key.startswith("base_model.model.layers.") for key in keys)
    whole = llama()
    with pytest.warns(UserWarning, match="GP629"):
        graphpatch.load_peft(whole, tmp_path)
    torch.testing.assert_close(logits(whole).detach(), expected)

    inside = nn.ModuleDict({"policy": llama(), "other": nn.Linear(2, 2)})
    with pytest.warns(UserWarning, match="GP629"):
        graphpatch.load_peft(inside, tmp_path)
    torch.testing.assert_close(inside["policy"](IDS).logits.detach(), expected)
    two = nn.ModuleDict({"policy": llama(), "reference": llama()})
    refused("GP623", two, tmp_path)


def test_a_saved_head_that_is_tied_here(tmp_path):
    theirs(llama(), tmp_path, **FIELDS, modules_to_save=["lm_head"])
    tied = llama(tie_word_embeddings=True)
    assert "embed_tokens" in refused("GP628", tied, tmp_path)
    tied.lm_head.weight = nn.Parameter(tied.lm_head.weight.detach().clone())
    graphpatch.load_peft(tied, tmp_path)


def test_on_the_meta_device(folder):
    with torch.device("meta"):
        model = llama()
    with pytest.raises(graphpatch.Error) as caught:
        graphpatch.load_peft(model, folder)
    assert caught.value.code == "GP616" and not graphpatch.patches(model)


def test_beside_another_adapter_and_again_onto_itself(folder):
    model = llama()
    plain_logits = logits(model).detach()
    first = graphpatch.load_peft(model, folder)
    alone = logits(model).detach()
    assert graphpatch.load_peft(model, folder) == first and torch.equal(logits(model), alone)
    second = graphpatch.load_peft(model, folder, adapter="second")
    assert "q_proj.lora_A_second" in next(iter(second.adapter_state_dict()))
    graphpatch.to_peft(second, folder / "second")
    torch.testing.assert_close(by_peft(llama(), folder / "second"), alone, atol=1e-5, rtol=1e-5)
    first.revert()
    torch.testing.assert_close(logits(model).detach(), alone)
    second.revert()
    assert torch.equal(logits(model), plain_logits)


def test_half_precision(folder):
    expected = logits_of(folder)
    model = llama().bfloat16()
    patch = graphpatch.load_peft(model, folder)
    assert {t.dtype for t in patch.adapter_state_dict().values()} == {torch.float32}
    torch.testing.assert_close(logits(model).float().detach(), expected, atol=0.05, rtol=0.05)


def test_random_state_is_left_alone(folder):
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    model = llama()
    torch.manual_seed(3)
    graphpatch.load_peft(model, folder)
    assert torch.equal(torch.rand(3), expected)


def test_a_classifier_of_another_size(tmp_path):
    theirs(bert(), tmp_path, target_modules=["query"], task_type="SEQ_CLS", r=4)
    assert "classifier.weight: [3, 16], and the model has [5, 16]" in refused("GP624", bert(5), tmp_path)
