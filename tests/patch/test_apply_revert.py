"""All or nothing, and exactly back."""

from __future__ import annotations

import copy
import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import graphpatch
from graphpatch.rewrites.lora import LoraLinear
from tests.patch.common import LORA, patch, randomise, refused, state
from tests.toys import lm, meta_lm

IDS = torch.arange(10).view(2, 5)


def test_identity_at_init_and_after_revert_is_exact():
    model = lm().eval()
    before, expected = state(model), model(IDS)
    handle = patch(model)
    assert torch.equal(model(IDS), expected)
    randomise(handle)
    assert not torch.equal(model(IDS), expected)
    handle.revert()
    assert state(model) == before
    assert torch.equal(model(IDS), expected)


def test_the_module_object_its_name_and_its_keys_survive():
    model = lm()
    q = model.model.layers[0].self_attn.q_proj
    keys = set(model.state_dict())
    patch(model)
    assert model.model.layers[0].self_attn.q_proj is q and isinstance(q, nn.Linear)
    assert type(q).__name__ == "Linear" and type(q).__module__ == "torch.nn.modules.linear"
    assert keys < set(model.state_dict())
    added = {k.rpartition(".")[2] for k in set(model.state_dict()) - keys}
    assert added == {"lora_A", "lora_B"}
    assert repr(q) == "Linear(in_features=16, out_features=16, bias=False, lora(rank=4, alpha=8))"


def test_a_failure_at_the_last_of_100_targets_leaves_the_model_untouched(monkeypatch):
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(100)))
    model[7].weight.requires_grad = False
    before, calls, real = state(model), itertools.count(1), LoraLinear.initialise

    def failing(entry, tensors, module):
        if next(calls) == 100:
            raise RuntimeError("out of luck")
        real(entry, tensors, module)

    monkeypatch.setattr(LoraLinear, "initialise", failing)
    with pytest.raises(graphpatch.ApplyError, match="out of luck") as caught:
        patch(model)
    assert caught.value.code == "GP510" and next(calls) == 101
    assert state(model) == before and graphpatch.patches(model) == []


def test_an_interruption_is_passed_on_after_rolling_back(monkeypatch):
    model, calls = lm(), itertools.count()
    before = state(model)

    def interrupted(entry, tensors, module):
        if next(calls) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(LoraLinear, "initialise", interrupted)
    with pytest.raises(KeyboardInterrupt):
        patch(model)
    assert state(model) == before


def test_a_failure_rolls_back_to_the_patches_that_were_there(monkeypatch):
    model = lm().eval()
    first = patch(model, 'patch q_proj with lora(rank=2, adapter="one")')
    randomise(first)
    before, expected = state(model), model(IDS)
    monkeypatch.setattr(LoraLinear, "initialise", lambda entry, tensors, module: 1 / 0)
    with pytest.raises(graphpatch.ApplyError):
        patch(model, 'patch {q,k}_proj with lora(rank=2, adapter="two")\nfreeze **')
    assert state(model) == before
    assert torch.equal(model(IDS), expected)


def test_applying_twice_changes_nothing():
    model = lm()
    rules = graphpatch.parse(LORA)
    first = graphpatch.apply(model, rules)
    after = state(model)
    assert graphpatch.apply(model, rules) == first
    plan = rules.plan(model)
    assert plan.apply(model) == first
    assert state(model) == after and graphpatch.patches(model) == [first]


TEXTS = [
    'patch {q,k}_proj with lora(rank=2, adapter="one")\nfreeze ** except @new',
    'patch {k,v}_proj with lora(rank=3, adapter="two")\ntrain layers[0]\nfreeze layers[1]',
    "patch k_proj with scale.output(2.0)\nfreeze ^lm_head\ntrain embed_tokens",
    "patch :*RMSNorm with set(eps=0.5)\nfreeze **",
]


@pytest.mark.parametrize("applied", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)])
def test_patches_revert_in_any_order_and_each_step_is_exact(applied):
    """After any revert the model equals one that only ever got the remaining patches, in their order."""
    ids = IDS

    def flags(m):
        return [(n, p.requires_grad) for n, p in m.named_parameters()]

    for order in random.Random(0).sample(list(itertools.permutations(range(4))), 3):
        model = lm().eval()
        model.model.norm.weight.requires_grad = False
        before = state(model)
        handles = {}
        for i in applied:
            handles[i] = patch(model, TEXTS[i])
        left = list(applied)
        for i in order:
            handles[i].revert()
            left.remove(i)
            reference = lm().eval()
            reference.model.norm.weight.requires_grad = False
            for j in left:
                patch(reference, TEXTS[j])
            assert flags(model) == flags(reference)
            assert torch.equal(model(ids), reference(ids))
            types = [type(m) for m in model.modules()]
            assert types == [type(m) for m in reference.modules()]
        assert state(model) == before


def test_the_order_of_application_makes_no_difference():
    outputs, classes = [], []
    for order in itertools.permutations(range(3)):
        model = lm().eval()
        for i in order:
            randomise(patch(model, TEXTS[i]))
        outputs.append(model(IDS))
        classes.append(type(model.model.layers[0].self_attn.k_proj))
    assert len(set(classes)) == 1
    for output in outputs:
        torch.testing.assert_close(output, outputs[0])


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_reverting_gives_any_model_back(data):
    def build(depth):
        kind = data.draw(st.sampled_from(["linear", "norm", "list", "shared"] if depth else ["linear", "norm"]))
        if kind == "linear":
            return nn.Linear(data.draw(st.integers(1, 3)), 2, bias=data.draw(st.booleans()))
        if kind == "norm":
            return nn.LayerNorm(2)
        if kind == "shared":
            one = nn.Linear(2, 2)
            return nn.ModuleDict({"a": one, "b": one})
        return nn.Sequential(*(build(depth - 1) for _ in range(data.draw(st.integers(1, 3)))))

    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), build(2), build(2))
    for parameter in model.parameters():
        parameter.requires_grad = data.draw(st.booleans())
    before = state(model)
    text = data.draw(
        st.sampled_from(
            [
                LORA,
                "patch :Linear with lora(rank=1) then scale.output(2.0)\ntrain **",
                "patch :LayerNorm with set(eps=0.1)\nfreeze :Linear",
                'patch *:Linear with wrap(class="torch.nn.Sequential") where in_features == 2',
            ]
        )
    )
    handle = patch(model, text, allow_import=["torch.nn.*"])
    assert state(model) != before
    handle.revert()
    assert state(model) == before


def test_tied_modules_are_patched_once_and_both_paths_see_it():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    handle = patch(model)
    assert len(handle.changes) == 1 and len(handle.trainable_parameters()) == 2
    randomise(handle)
    x = torch.randn(2, 4)
    assert torch.equal(model["a"](x), model["b"](x)) and not torch.equal(
        model["a"](x), nn.functional.linear(x, shared.weight, shared.bias)
    )
    handle.revert()
    assert model["a"] is model["b"][0] is shared and type(shared) is nn.Linear


def test_tied_weights_stay_tied():
    model = lm(tied=True)
    refused("GP424", model, "patch ^lm_head with lora(rank=2)")
    handle = patch(model, "patch ^lm_head with scale.output(2)\npatch q_proj with lora(rank=2)\nfreeze ** except @new")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not model.model.embed_tokens.weight.requires_grad
    handle.revert()
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_meta_device():
    model = meta_lm()
    before = state(model)
    handle = patch(model)
    assert {p.device.type for p in handle.trainable_parameters()} == {"meta"}
    storages = {p.untyped_storage()._cdata for p in handle.trainable_parameters()}
    assert len(storages) == len(handle.trainable_parameters())  # else loaders take them for tied
    handle.revert()
    assert state(model) == before


def test_modes_are_kept_and_probing_changes_nothing():
    model = lm()
    model.model.layers[1].eval()
    modes = [m.training for m in model.modules()]
    handle = patch(model)
    assert [m.training for m in model.modules()] == modes
    before, random_state = state(model), torch.get_rng_state()
    assert handle.probe({"ids": IDS}) == handle.probe((IDS,)) == handle.probe(IDS) == []
    assert state(model) == before and torch.equal(torch.get_rng_state(), random_state)


def test_probe_puts_buffers_back():
    model = nn.Sequential(nn.Linear(2, 2), Counter())
    handle = patch(model)
    handle.probe(torch.ones(1, 2))
    assert model[1].calls.item() == 0


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x


def test_probe_names_what_is_never_called():
    model = Bypassing()
    handle = patch(model)
    assert handle.probe(torch.ones(1, 2), strict=False) == ["unused"]
    with pytest.raises(graphpatch.ApplyError, match="`unused`") as caught:
        handle.probe(torch.ones(1, 2))
    assert caught.value.code == "GP514"


class Bypassing(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x):
        return nn.functional.linear(self.used(x), self.unused.weight)


def test_disabled_computes_as_before_and_comes_back():
    model = lm().eval()
    expected = model(IDS)
    handle = patch(
        model, "patch {q,k}_proj with lora(rank=2) then scale.output(3.0)\npatch :*RMSNorm with set(eps=0.5)"
    )
    randomise(handle)
    patched, after = model(IDS), state(model)
    with handle.disabled():
        assert torch.equal(model(IDS), expected)
        with handle.disabled():
            assert torch.equal(model(IDS), expected)
        with pytest.raises(graphpatch.ApplyError, match="switched off"):
            handle.revert()
    assert torch.equal(model(IDS), patched) and state(model) == after
    with pytest.raises(ZeroDivisionError), handle.disabled():
        raise ZeroDivisionError
    assert torch.equal(model(IDS), patched)


def test_one_of_two_adapters_can_be_switched_off():
    model = lm().eval()
    one = patch(model, 'patch q_proj with lora(rank=2, adapter="one")')
    randomise(one)
    alone = model(IDS)
    two = patch(model, 'patch q_proj with lora(rank=2, adapter="two")')
    randomise(two)
    both = model(IDS)
    assert not torch.equal(both, alone)
    with two.disabled():
        assert torch.equal(model(IDS), alone)
    assert torch.equal(model(IDS), both)


def test_a_second_adapter_and_the_names_of_keys():
    model = lm()
    patch(model, "patch q_proj with lora(rank=2)")
    handle = patch(model, "patch q_proj with lora(rank=3)", adapter="math")
    assert {k.rpartition(".")[2] for k in handle.adapter_state_dict()} == {"lora_A_math", "lora_B_math"}
    assert model.model.layers[0].self_attn.q_proj.lora_A_math.shape == (3, 16)
    assert 'lora(rank=2), lora(rank=3, adapter="math")' in repr(model)


def test_the_same_slot_twice_is_refused():
    model = lm()
    rules = graphpatch.parse("patch q_proj with lora(rank=2)")
    late = graphpatch.parse("patch {q,k}_proj with lora(rank=4)").plan(model)
    patch(model, "patch q_proj with lora(rank=2)")
    before = state(model)
    with pytest.raises(graphpatch.ApplyError, match=r"has lora\(rank=2\) already"):
        late.apply(model)  # planned before the other was applied
    assert state(model) == before and len(graphpatch.patches(model)) == 1 and rules


def test_trainable_parameters_and_state_dict_of_the_adapter():
    model = lm()
    handle = patch(model)
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert names == set(handle.adapter_state_dict()) and all("lora_" in n for n in names)
    assert {id(p) for p in handle.trainable_parameters()} == {id(dict(model.named_parameters())[n]) for n in names}
    handle.revert()
    assert all(p.requires_grad for p in model.parameters())


def test_buffers_are_never_frozen_and_integers_never_trained():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model.register_parameter("packed", nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False))
    handle = patch(model, "patch :Linear with lora(rank=1)\nfreeze **\ntrain **")
    assert not model.packed.requires_grad and model[0].weight.requires_grad
    handle.revert()
    assert "GP517" == _code(lambda: patch(model, "patch :Linear with lora(rank=1)\ntrain ^packed"))


def _code(call):
    with pytest.raises(graphpatch.Error) as caught:
        call()
    return caught.value.code


def test_a_plan_of_another_model_is_refused_with_the_difference():
    plan = graphpatch.parse(LORA).plan(lm(layers=4))
    with pytest.raises(graphpatch.ApplyError) as caught:
        plan.apply(lm(layers=3))
    assert caught.value.code == "GP421" and "model.layers[3]" in str(caught.value)
    twin = lm(layers=4)
    assert len(plan.apply(twin).changes) == 25 and type(twin.lm_head) is not nn.Linear


def test_a_model_that_changed_since_it_was_planned_is_refused():
    model = lm()
    plan = graphpatch.parse(LORA).plan(model)
    model.model.layers[2].mlp.up_proj = nn.Linear(16, 8)
    with pytest.raises(graphpatch.ApplyError) as caught:
        plan.apply(model)
    assert caught.value.code == "GP421" and "^model.layers[2].mlp.up_proj   Linear(16, 32) -> Linear(16, 8)" in str(
        caught.value
    )
    same = lm()
    plan = graphpatch.parse(LORA).plan(same)
    same.lm_head.weight = nn.Parameter(torch.zeros(7, 16))
    with pytest.raises(graphpatch.ApplyError) as caught:
        plan.apply(same)
    assert caught.value.code == "GP421"


def test_a_compiled_root_is_seen_through():
    model = lm()
    compiled = torch.compile(model, backend="eager")
    handle = patch(compiled)
    assert handle.model is model and graphpatch.patches(compiled) == [handle]


def test_reverting_twice_says_so():
    handle = patch(lm())
    handle.revert()
    with pytest.raises(graphpatch.ApplyError, match="reverted already"):
        handle.revert()
    assert "reverted" in repr(handle)


def test_an_orphan_is_named_and_given_back():
    model = lm()
    old = model.lm_head
    handle = patch(model, "patch ^lm_head with lora(rank=2)")
    model.lm_head = nn.Linear(16, 40)  # as resize_token_embeddings does
    with pytest.warns(UserWarning, match="lm_head"):
        handle.revert()
    assert type(old) is nn.Linear and set(old._parameters) == {"weight", "bias"}


def test_patching_in_inference_mode_gives_parameters_that_train():
    model = lm()
    with torch.inference_mode():
        handle = patch(model)
    model(IDS).sum().backward()
    assert all(p.grad is not None for p in handle.trainable_parameters())


def test_what_a_rule_may_not_touch_is_refused_and_nothing_has_changed():
    assert "lora" in refused("GP410", lm(), "patch ^model.norm with lora(rank=2)")
    model = lm()
    model.lm_head.lora_A = "mine"
    assert "lora_A" in refused("GP502", model)


def test_copies_are_independent():
    model = lm().eval()
    handle = patch(model)
    randomise(handle)
    twin = copy.deepcopy(model)
    expected = twin(IDS)
    handle.revert()
    assert torch.equal(twin(IDS), expected)
    (other,) = graphpatch.patches(twin)
    assert other != handle and other.id == handle.id and other.model is twin
    other.revert()
    assert torch.equal(twin(IDS), model(IDS))
    assert {type(m) for m in twin.modules()} == {type(m) for m in model.modules()}
