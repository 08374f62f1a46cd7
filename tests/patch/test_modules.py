"""`replace`, `wrap`, `set` and `walk`: the changes that are not in place."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graphpatch
from tests.patch.common import patch, refused, state
from tests.toys import lm, meta_lm

IDS = torch.arange(10).view(2, 5)
ALLOW = {"allow_import": ["tests.patch.*"]}


class Norm(nn.Module):
    """Replaces RMSNorm: the same weight, and a shift of its own."""

    def __init__(self, size: int = 16, eps: float = 0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.shift = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) + self.shift


class Timed(nn.Module):
    def __init__(self, inner, gain: float = 1.0):
        super().__init__()
        self.inner, self.calls = inner, 0
        self.gain = nn.Parameter(torch.tensor(gain))

    def forward(self, *args):
        self.calls += 1
        return self.inner(*args) * self.gain


class Projected(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.out = inner, nn.Linear(16, 16)


class Failing(nn.Module):
    def __init__(self, **options):
        raise ValueError("no such norm")


REPLACE = 'patch layers[0].input_layernorm with replace(class="tests.patch.test_modules.Norm", eps=eps)'
WRAP = 'patch layers[0].mlp with wrap(class="tests.patch.test_modules.Timed", gain=2.0)'


def test_nothing_is_imported_without_permission():
    message = refused("GP505", lm(), REPLACE)
    assert 'allow_import=["tests.*"]' in message and "--allow-import" in message
    refused("GP505", lm(), REPLACE, allow_import=["test.*", "tests.patch"])


def test_replace_takes_the_parameters_that_fit_and_gives_the_old_module_back():
    model = lm().eval()
    model.model.layers[0].input_layernorm.weight.requires_grad = False
    before, old, plain = state(model), model.model.layers[0].input_layernorm, model(IDS)
    handle = patch(model, REPLACE, **ALLOW)
    new = model.model.layers[0].input_layernorm
    assert type(new) is Norm and new.weight is old.weight and new.eps == old.eps and not new.training
    assert set(handle.adapter_state_dict()) == {"model.layers.0.input_layernorm.shift"}
    assert not torch.equal(model(IDS), plain) and handle.probe(IDS) == []
    with handle.disabled():
        assert torch.equal(model(IDS), plain)
    handle.revert()
    assert model.model.layers[0].input_layernorm is old and state(model) == before
    assert torch.equal(model(IDS), plain)


def test_freezing_all_but_the_new_knows_what_a_replacement_brought():
    model = lm()
    text = f"{REPLACE}\npatch q_proj with lora(rank=2)\nfreeze ** except @new"
    handle = patch(model, text, **ALLOW)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == set(handle.adapter_state_dict()) and "model.layers.0.input_layernorm.shift" in trained
    assert len(trained) == 9
    handle.revert()
    assert all(p.requires_grad for p in model.parameters())


def test_a_replacement_is_built_where_the_module_was_and_in_its_dtype():
    model = meta_lm()
    patch(model, REPLACE, **ALLOW)
    assert model.model.layers[0].input_layernorm.shift.is_meta
    model = lm().to(torch.bfloat16)
    patch(model, REPLACE, **ALLOW)
    assert model.model.layers[0].input_layernorm.shift.dtype == torch.bfloat16


def test_buffers_of_a_replacement_are_copies():
    model = nn.Sequential(nn.BatchNorm1d(3))
    before = state(model)
    handle = patch(
        model, 'patch ^0 with replace(class="torch.nn.BatchNorm1d", num_features=3)', allow_import=["torch.*"]
    )
    model(torch.randn(5, 3))
    assert model[0].num_batches_tracked == 1
    handle.revert()
    assert state(model) == before


def test_wrap_passes_the_original_and_every_place_of_a_tied_module_sees_it():
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    shared.eval()
    handle = patch(model, 'patch a with wrap(class="tests.patch.test_modules.Timed", gain=3.0)', **ALLOW)
    assert model["a"] is model["b"][0] and model["a"].inner is shared and not model["a"].training
    assert "a.inner.weight" in model.state_dict()
    x = torch.ones(1, 2)
    assert torch.equal(model["b"](x), shared(x) * 3)
    handle.revert()
    assert model["a"] is model["b"][0] is shared


def test_a_wrapper_leaves_the_modes_of_what_it_wraps():
    model = lm()
    model.model.layers[0].mlp.dropout.eval()
    patch(model, WRAP, **ALLOW)
    assert model.model.layers[0].mlp.training and not model.model.layers[0].mlp.inner.dropout.training


def test_a_constructor_that_fails_is_one_clear_refusal():
    message = refused("GP506", lm(), REPLACE.replace("Norm", "Failing"), **ALLOW)
    assert "no such norm" in message and "input_layernorm" in message
    refused("GP506", lm(), REPLACE.replace("Norm", "Missing"), **ALLOW)
    refused("GP506", lm(), REPLACE.replace("Norm", "ALLOW"), **ALLOW)
    refused("GP506", lm(), REPLACE.replace("tests.patch.test_modules.Norm", "tests.patch.test_modules.state"), **ALLOW)


def test_the_root_cannot_be_replaced():
    assert "root" in refused("GP410", lm(), 'patch ^ with wrap(class="torch.nn.Sequential")')


def test_a_patch_that_another_hangs_on_names_it():
    model = lm()
    first = patch(model, WRAP.replace("Timed", "Projected").replace(", gain=2.0", ""), **ALLOW)
    second = patch(model.model.layers[0].mlp.out, "patch ^ with scale.output(0.5)")
    with pytest.raises(graphpatch.ApplyError, match=r"scale\.output\(by=0\.5\)") as caught:
        first.revert()
    assert caught.value.code == "GP508"
    second.revert()
    first.revert()
    assert type(model.model.layers[0].mlp).__name__ == "MLP"


def test_replaced_models_survive_copying():
    import copy
    import pickle

    model = lm().eval()
    plain = model(IDS)
    patch(model, f"{REPLACE}\n{WRAP}", **ALLOW)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(IDS), model(IDS))
        (handle,) = graphpatch.patches(twin)
        handle.revert()
        assert torch.equal(twin(IDS), plain) and type(twin.model.layers[0].mlp).__name__ == "MLP"


# ── set ──


def test_set_keeps_types_and_is_undone():
    model = nn.Sequential(nn.Conv2d(1, 1, 3), nn.Dropout(0.1))
    handle = patch(model, "patch :Conv2d with set(stride=[2, 2])\npatch :Dropout with set(p=0)")
    assert model[0].stride == (2, 2) and model[1].p == 0.0 and type(model[1].p) is float
    assert model[0](torch.ones(1, 1, 5, 5)).shape == (1, 1, 2, 2)
    handle.revert()
    assert model[0].stride == (1, 1) and model[1].p == 0.1


@pytest.mark.parametrize(
    ("argument", "why"),
    [
        ("eps2=1.0", "has no attribute `eps2`"),
        ("eps=true", "true or false"),
        ('eps="x"', "text"),
        ("weight=1", "is a parameter"),
        ("training=false", "has no attribute"),
    ],
)
def test_set_refuses_what_is_not_there_or_of_another_type(argument, why):
    assert why in refused("GP410", lm(), f"patch layers[0].input_layernorm with set({argument})")


def test_the_tree_of_a_patched_model_is_the_original_tree():
    model = lm()
    before = graphpatch.Tree.of(model).fingerprint
    patch(
        model,
        f"{REPLACE}\n{WRAP}\npatch :*RMSNorm with set(eps=0.5) except input_layernorm\npatch q_proj with lora(rank=2)",
        **ALLOW,
    )
    assert graphpatch.Tree.of(model).fingerprint == before


# ── walk ──


def test_walk_visits_each_module_once_with_what_it_asks_for():
    shared = nn.Linear(1, 1)
    model = nn.ModuleDict({"d": nn.ModuleDict({"k": shared}), "l": nn.ModuleList([nn.ReLU(), shared])})
    seen = []
    assert graphpatch.walk(model, lambda m, name, prefix, index: seen.append((prefix, name, index))) is model
    assert seen == [("", "", None), ("", "d", None), ("d", "k", None), ("", "l", None), ("l", "0", 0)]
    paths = []
    graphpatch.walk(model, lambda module, **facts: paths.append(facts["path"]))
    assert paths == ["", "d", "d.k", "l", "l.0"]
    only = []
    graphpatch.walk(model, only.append)
    assert only == list(model.modules())


def test_walk_leaves_what_is_not_replaced_and_updates_every_place():
    class Fixed(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Linear(1, 1))

    shared = nn.Linear(1, 1)
    ordered = nn.Sequential()
    ordered.add_module("a", shared)
    ordered.add_module("b", Fixed())
    model = nn.ModuleList([ordered, shared])
    handle = ordered.register_forward_hook(lambda *a: None)
    keys = list(model.state_dict())
    graphpatch.walk(model, lambda m: None)
    assert list(model.state_dict()) == keys and model[0] is ordered and handle.id in ordered._forward_hooks
    new = nn.ReLU()
    graphpatch.walk(model, lambda m: new if m is shared else None)
    assert model[1] is model[0].a is new and type(model[0].b) is Fixed
    root = nn.Identity()
    assert graphpatch.walk(model, lambda m: root if m is model else m) is root


def test_walk_does_not_visit_what_it_made_and_is_all_or_nothing():
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    graphpatch.walk(model, lambda m: nn.Sequential(m) if isinstance(m, nn.Linear) else None)
    assert type(model[0][0]) is nn.Linear
    before = state(model)

    def failing(module, path):
        if path == "1.0":
            raise ValueError
        return nn.ReLU() if path else None

    with pytest.raises(ValueError):
        graphpatch.walk(model, failing)
    assert state(model) == before
    with pytest.raises(graphpatch.ApplyError, match="returned int"):
        graphpatch.walk(model, lambda m: 3)
