"""Experts that a file holds one by one, onto a model that has them in stacks; against PEFT, which converts them too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import graphpatch
from tests.checkpoint.peft.models import by_peft, logits, mixtral, qwen3_moe, trained

PROJECTIONS = {"gate_proj": (12, 16), "up_proj": (12, 16), "down_proj": (16, 12)}
OLD = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def old(folder: Path, names: list[str], old_names: bool = False, **fields: object) -> None:
    """An adapter of Transformers 4: each expert's projection is a linear. Layer 0 of the model is dense."""
    made = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(0 if old_names else 1, 2):
        for expert in range(4):
            for name in names:
                out, in_ = (
                    (24, 16) if old_names and name != "down_proj" else (16, 24) if old_names else PROJECTIONS[name]
                )
                block = (
                    f"block_sparse_moe.experts.{expert}.{OLD[name]}" if old_names else f"mlp.experts.{expert}.{name}"
                )
                stem = f"base_model.model.model.layers.{layer}.{block}"
                tensors[f"{stem}.lora_A.weight"] = torch.randn(3, in_, generator=made)
                tensors[f"{stem}.lora_B.weight"] = torch.randn(out, 3, generator=made)
        for name in ("q_proj",):
            stem = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(3, 16, generator=made)
            tensors[f"{stem}.lora_B.weight"] = torch.randn(16, 3, generator=made)
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    listed = [OLD[n] for n in names] if old_names else names
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 2, "target_modules": ["q_proj", *listed], **fields}
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("names", [list(PROJECTIONS), ["down_proj"]])
def test_as_peft_converts_them(names, tmp_path):
    old(tmp_path, names, old_names=True)
    model = mixtral()
    graphpatch.load_peft(model, tmp_path)
    torch.testing.assert_close(logits(model).detach(), by_peft(mixtral(), tmp_path), atol=1e-5, rtol=1e-5)


def test_each_expert_gains_its_own_product(tmp_path):
    """By the definition, on the weights; also for one projection of the two that are one tensor, which PEFT refuses."""
    fields = {"use_rslora": True, "alpha_pattern": {"up_proj": 5}, "layers_to_transform": [1]}
    for names in (["gate_proj", "up_proj", "down_proj"], ["up_proj"]):
        old(tmp_path, names, **fields)
        model, expected = qwen3_moe(), qwen3_moe()
        graphpatch.load_peft(model, tmp_path)
        file = load_file(tmp_path / "adapter_model.safetensors")
        with torch.no_grad():
            experts = expected.model.layers[1].mlp.experts
            rows = {"gate_proj": slice(0, 12), "up_proj": slice(12, 24), "down_proj": slice(0, 16)}
            for number in range(4):
                for name in names:
                    stem = f"base_model.model.model.layers.1.mlp.experts.{number}.{name}"
                    scale = (5 if name == "up_proj" else 2) / 3**0.5
                    delta = scale * file[f"{stem}.lora_B.weight"] @ file[f"{stem}.lora_A.weight"]
                    stack = experts.down_proj if name == "down_proj" else experts.gate_up_proj
                    stack[number, rows[name]] += delta
            stem = "base_model.model.model.layers.1.self_attn.q_proj"
            delta = 2 / 3**0.5 * file[f"{stem}.lora_B.weight"] @ file[f"{stem}.lora_A.weight"]
            expected.model.layers[1].self_attn.q_proj.weight += delta
        torch.testing.assert_close(logits(model), logits(expected), atol=1e-5, rtol=1e-5)


def test_what_was_written_for_servers_comes_back(tmp_path):
    model = mixtral()
    patch = trained(
        model, "patch experts.{gate_up,down}_proj | q_proj with lora(rank=4, alpha=6)\nfreeze ** except @new"
    )
    graphpatch.to_peft(patch, tmp_path, profile="portable")
    again = mixtral()
    back = graphpatch.load_peft(again, tmp_path)
    torch.testing.assert_close(logits(again), logits(model), atol=1e-5, rtol=1e-5)
    shapes = {key: tensor.shape for key, tensor in back.adapter_state_dict().items()}
    assert shapes.items() >= {key: tensor.shape for key, tensor in patch.adapter_state_dict().items()}.items()


def test_some_experts_of_a_layer(tmp_path):
    old(tmp_path, list(PROJECTIONS))
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({k: v for k, v in tensors.items() if "experts.2.up_proj" not in k}, path)
    with pytest.raises(graphpatch.Error, match=r"expert 2 has no up projection") as caught:
        graphpatch.load_peft(qwen3_moe(), tmp_path)
    assert caught.value.code == "GP623"


def test_shapes_of_experts(tmp_path):
    old(tmp_path, list(PROJECTIONS))
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    for wrong in (torch.zeros(3), torch.zeros(3, 5), torch.zeros(2, 16), torch.zeros(3, 16, dtype=torch.int64)):
        save_file({k: wrong if "experts.2.up_proj.lora_A" in k else v for k, v in tensors.items()}, path)
        with pytest.raises(graphpatch.Error, match=r"up projection of expert 2") as caught:
            graphpatch.load_peft(qwen3_moe(), tmp_path)
        assert caught.value.code == "GP624"
