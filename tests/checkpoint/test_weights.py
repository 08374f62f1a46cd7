"""Weights into a patch that is there: all of them, or none."""

from __future__ import annotations

import pytest
import torch

import graphpatch
from tests.checkpoint import common
from tests.checkpoint.common import IDS, LORA, NORMS, saved
from tests.patch.common import randomise, state
from tests.toys import lm


@pytest.fixture
def model():
    return lm().eval()


def refused(code, patch, source):
    before = state(patch.model)
    with pytest.raises(graphpatch.Error) as caught:
        graphpatch.load_weights(patch, source)
    assert state(patch.model) == before and caught.value.code == code
    return str(caught.value)


def test_from_a_state_dict_and_from_a_folder(tmp_path, model):
    folder, after = saved(tmp_path / "a")
    patch = graphpatch.apply(model, graphpatch.parse(LORA))
    graphpatch.load_weights(patch, str(folder))
    assert torch.equal(model(IDS), after)
    weights = {key: value.clone() for key, value in patch.adapter_state_dict().items()}
    randomise(patch)
    assert not torch.equal(model(IDS), after)
    graphpatch.load_weights(patch, weights)
    assert torch.equal(model(IDS), after)


def test_base_weights_too_if_they_are_given(tmp_path, model):
    folder, after = saved(tmp_path / "a", NORMS)
    patch = graphpatch.apply(model, graphpatch.parse(NORMS))
    graphpatch.load_weights(patch, folder)
    assert torch.equal(model(IDS), after)
    graphpatch.load_weights(patch, patch.adapter_state_dict())
    assert torch.equal(model(IDS), after)


def test_into_a_patch_under_another_name(tmp_path, model):
    folder, after = saved(tmp_path / "a")
    patch = graphpatch.apply(model, graphpatch.parse(LORA), adapter="x")
    graphpatch.load_weights(patch, folder)
    assert torch.equal(model(IDS), after)


def test_missing_and_unexpected_names(model):
    patch = graphpatch.apply(model, graphpatch.parse(LORA))
    weights = patch.adapter_state_dict()
    weights["lm_head.lora_C"] = weights.pop("lm_head.lora_B")
    text = refused("GP614", patch, weights)
    assert "1 tensors too few and 1 too many" in text
    assert "- lm_head.lora_B   missing" in text and "+ lm_head.lora_C   unexpected" in text


def test_shapes_and_types(model):
    patch = graphpatch.apply(model, graphpatch.parse(LORA))
    weights = patch.adapter_state_dict()
    weights["lm_head.lora_B"] = torch.zeros(32, 5)
    assert "lm_head.lora_B: [32, 5], and the model has [32, 4]" in refused("GP615", patch, weights)
    weights["lm_head.lora_B"] = torch.zeros(32, 4, dtype=torch.int32)
    assert "lm_head.lora_B: int32, and the model has float32" in refused("GP615", patch, weights)
    weights["lm_head.lora_B"] = "zeros"
    assert "lm_head.lora_B: str, and no tensor" in refused("GP615", patch, weights)


def test_what_was_put_is_taken_back_where_one_does_not_go(model):
    patch = graphpatch.apply(model.half(), graphpatch.parse(LORA.replace("alpha=8", 'dtype="float16"')))
    weights = {key: value.float() + 1 for key, value in patch.adapter_state_dict().items()}
    weights["lm_head.lora_B"][0, 0] = 1e30
    assert "lm_head.lora_B has values too large for float16" in refused("GP617", patch, weights)
    weights["lm_head.lora_B"][0, 0] = 2
    graphpatch.load_weights(patch, weights)
    assert patch.adapter_state_dict()["lm_head.lora_B"][0, 0] == 2


def test_an_optimizer_goes_on_with_the_same_parameters(tmp_path, model):
    folder, _ = saved(tmp_path / "a")
    patch = common.trained(model)
    before = [id(p) for p in patch.trainable_parameters()]
    graphpatch.load_weights(patch, folder)
    assert [id(p) for p in patch.trainable_parameters()] == before
    assert all(p.requires_grad and p.is_leaf for p in patch.trainable_parameters())


def test_a_reverted_patch_takes_none(model):
    patch = graphpatch.apply(model, graphpatch.parse(LORA))
    weights = patch.adapter_state_dict()
    patch.revert()
    refused("GP509", patch, weights)
