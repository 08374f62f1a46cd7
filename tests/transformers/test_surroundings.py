"""What accelerate, the kernels hub and `resize_token_embeddings` do to a patched model, and what is said of it."""

from __future__ import annotations

import types

import pytest
import torch
from accelerate import Accelerator, cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from accelerate.state import AcceleratorState
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import graphpatch
from graphpatch.transformers import AdapterCheckpoint
from tests.patch.common import randomise, state

from .common import LORA, llama, trainer

PLAIN = LORA.replace(", dropout=0.1", "")
IDS = torch.tensor([[1, 2, 3]])


def apply(model: nn.Module, text: str = PLAIN) -> graphpatch.Patch:
    patch = graphpatch.apply(model, graphpatch.parse(text))
    randomise(patch)
    return patch


def expected() -> tuple[torch.Tensor, torch.Tensor]:
    """The logits without and with the patch, where nobody hooks."""
    model = llama().eval()
    plain = model(IDS).logits
    apply(model)
    return plain, model(IDS).logits


# ── accelerate ──


def hook(model: nn.Module) -> None:
    for module in model.modules():
        add_hook_to_module(module, ModelHook(), append=True)


def unhook(model: nn.Module) -> None:
    remove_hook_from_module(model, recurse=True)


@pytest.mark.parametrize("order", ["hpur", "hpru", "phru", "phur", "hupr", "hhpur", "phhru"])
def test_hooks_and_patches_in_any_order(order):
    """h: hook, u: unhook, p: patch, r: revert."""
    plain, patched = expected()
    model, patch = llama().eval(), None
    for step in order:
        if step == "p":
            patch = apply(model)
        elif step == "r":
            patch.revert()
            patch = None
        else:
            hook(model) if step == "h" else unhook(model)
        assert torch.equal(model(IDS).logits, plain if patch is None else patched), step
        if patch is not None:
            assert patch.probe({"input_ids": IDS}) == []


def placed(folder):
    places = dict.fromkeys(["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
    return {
        "device_map": {**places, "model.layers.1": "disk"},
        "offload_dir": folder,
        "main_device": "cpu",
        "force_hooks": True,
    }


@pytest.mark.parametrize("how", ["cpu", "disk", "dispatch"])
def test_a_patched_model_is_offloaded(how, tmp_path):
    plain, patched = expected()
    model = llama().eval()
    patch = apply(model)
    if how == "cpu":
        cpu_offload(model, execution_device="cpu")
    elif how == "disk":
        disk_offload(model, str(tmp_path), execution_device="cpu")
    else:
        dispatch_model(model, **placed(str(tmp_path)))
    torch.testing.assert_close(model(IDS).logits, patched)
    with pytest.raises(graphpatch.Error, match="remove_hook_from_module") as caught:
        graphpatch.save_adapter(patch, tmp_path / "adapter")
    assert caught.value.code == "GP605"
    unhook(model)
    graphpatch.save_adapter(patch, tmp_path / "adapter")
    base = llama().eval()
    graphpatch.load_adapter(base, tmp_path / "adapter")
    assert torch.equal(base(IDS).logits, patched)
    patch.revert()
    assert torch.equal(model(IDS).logits, plain)


def test_what_is_offloaded_is_not_patched_and_what_is_not_is(tmp_path):
    model = llama().eval()
    dispatch_model(model, **placed(str(tmp_path)))
    plain = model(IDS).logits
    patch = apply(model, "patch layers[0].**:Linear with lora(rank=4)\nfreeze ** except @new")
    assert not torch.equal(model(IDS).logits, plain)
    patch.revert()
    assert torch.equal(model(IDS).logits, plain)
    before = state(model)
    with pytest.raises(graphpatch.ApplyError) as caught:
        apply(model)
    assert caught.value.code == "GP512" and state(model) == before


@pytest.fixture
def accelerator():
    def made(precision: str) -> Accelerator:
        AcceleratorState._reset_state(True)
        return Accelerator(mixed_precision=precision, cpu=True)

    yield made
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_prepared_trained_unwrapped_reverted(precision, accelerator):
    model = llama()
    here = accelerator(precision)
    patch = apply(model)
    optimizer = torch.optim.SGD(patch.trainable_parameters(), lr=0.1)
    ready, optimizer = here.prepare(model, optimizer)
    before = {name: value.clone() for name, value in patch.adapter_state_dict().items()}
    here.backward(ready(IDS, labels=IDS).loss)
    optimizer.step()
    assert all(not torch.equal(value, before[name]) for name, value in patch.adapter_state_dict().items())
    assert here.unwrap_model(ready, keep_fp32_wrapper=False) is model
    patch.revert()
    assert torch.equal(model.eval()(IDS).logits, llama().eval()(IDS).logits)


def test_a_root_that_mixed_precision_wrapped_says_how_to_unwrap_it(accelerator):
    x, model = torch.randn(2, 4), nn.Linear(4, 4)
    plain = model(x)
    here = accelerator("bf16")
    patch = apply(model, "patch ^ with lora(rank=2)\nfreeze ** except @new")
    patched = model(x)
    ready = here.prepare(model)
    torch.testing.assert_close(ready(x), patched, atol=0.05, rtol=0.05)
    with pytest.raises(graphpatch.ApplyError, match="keep_fp32_wrapper=False") as caught:
        patch.revert()
    assert caught.value.code == "GP521"
    here.unwrap_model(ready, keep_fp32_wrapper=False)
    assert torch.equal(model(x), patched)
    patch.revert()
    assert torch.equal(model(x), plain)

    model = here.prepare(nn.Linear(4, 4))
    with pytest.raises(graphpatch.ApplyError, match="keep_fp32_wrapper=False") as caught:
        apply(model, "patch ^ with lora(rank=2)\nfreeze ** except @new")
    assert caught.value.code == "GP501"


# ── the kernels hub ──


@pytest.fixture
def hub(monkeypatch):
    """As `kernels.replace_kernel_forward_from_hub` marks a class; returned: what `kernels.kernelize` does."""
    monkeypatch.setattr(LlamaRMSNorm, "kernel_layer_name", "RMSNorm", raising=False)
    monkeypatch.setattr(LlamaRMSNorm, "kernel_condition", staticmethod(lambda module: True), raising=False)

    def fast(self, hidden_states):
        return torch.zeros_like(hidden_states)

    def kernelize(model: nn.Module) -> int:
        count = 0
        for module in model.modules():
            cls = type(module)
            if hasattr(cls, "kernel_layer_name") and cls.kernel_condition(module):
                module.forward = types.MethodType(fast, module)
                count += 1
        return count

    return kernelize


def test_the_kernels_hub_leaves_patched_layers_alone(hub):
    model = llama()
    patch = apply(model, "patch input_layernorm with scale.output(2.0)\nfreeze **")
    assert hub(model) == 3
    norm, x = model.model.layers[0].input_layernorm, torch.randn(2, 32)
    assert torch.equal(norm(x), 2 * LlamaRMSNorm.forward(norm, x))
    patch.revert()
    assert norm.kernel_layer_name == "RMSNorm" and hub(model) == 5
    assert not norm(x).any()
    with pytest.raises(graphpatch.ApplyError, match="gives up the kernel of the hub") as caught:
        apply(model, "patch input_layernorm with scale.output(2.0)\nfreeze **")
    assert caught.value.code == "GP501"


# ── another vocabulary ──


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_a_model_that_was_resized_has_outgrown_its_patch(target, tmp_path):
    rules = f"patch {target} with lora(rank=4)\nfreeze ** except @new"
    model = llama()
    patch = apply(model, rules)
    model.resize_token_embeddings(70, mean_resizing=False)
    run = trainer(model, tmp_path, AdapterCheckpoint(patch))
    if target == "lm_head":  # of an embedding the rows that were there merge as ever
        with pytest.raises(graphpatch.ApplyError, match="another module is in its place") as caught:
            patch.merge()
        assert caught.value.code == "GP531"
    attempts = [run.train, lambda: graphpatch.save_adapter(patch, tmp_path)]
    if target == "embed_tokens":
        attempts.append(lambda: model(torch.tensor([[69]])))
    for attempt in attempts:
        with pytest.raises(graphpatch.Error, match="resize first") as caught:
            attempt()
        assert caught.value.code == "GP655"
    assert not (tmp_path / "adapter.json").exists()

    resized = llama()
    resized.resize_token_embeddings(70, mean_resizing=False)
    trainer(resized, tmp_path, AdapterCheckpoint(apply(resized, rules)), max_steps=2).train()
    again = llama()
    again.resize_token_embeddings(70, mean_resizing=False)
    graphpatch.load_adapter(again, tmp_path / "checkpoint-2")


def test_a_resized_model_whose_patch_is_elsewhere_goes_on(tmp_path):
    model = llama()
    patch = apply(model)
    model.resize_token_embeddings(70, mean_resizing=False)
    trainer(model, tmp_path, AdapterCheckpoint(patch), max_steps=2).train()
    assert model(torch.tensor([[69]])).logits.shape == (1, 1, 70)
