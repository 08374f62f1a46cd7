"""Merging in memory: exact in, exact out, all or nothing, and what else may be done to a merged model."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

import graphpatch
from tests.patch.common import LORA, patch, randomise, state
from tests.toys import LM, lm, meta_lm

IDS = torch.arange(10).view(2, 5)
TWO = "patch q_proj with lora(rank=4)\nfreeze ** except @new"


def patched(model: nn.Module | None = None, text: str = LORA, **options) -> tuple[nn.Module, graphpatch.Patch]:
    model = lm().eval() if model is None else model
    made = patch(model, text, **options)
    randomise(made)
    return model, made


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def refused(code: str, call, *said: str) -> None:
    with pytest.raises(graphpatch.Error) as caught:
        call()
    assert caught.value.code == code, str(caught.value)
    for word in said:
        assert word in str(caught.value)


# ── in and out ──


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_merged_weights_are_the_whole_delta_added_in_float32_and_rounded_once(dtype):
    model, made = patched(lm().to(dtype))
    before, factors = weights(model), made.adapter_state_dict()
    made.merge()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    checked = 0
    for name, now in model.state_dict().items():
        a, b = (factors.get(name.replace("weight", key)) for key in ("lora_A", "lora_B"))
        if a is not None and name.endswith("weight"):
            before[name] = (before[name].to(wide) + (b.to(wide) @ a.to(wide)) * 2.0).to(dtype)
            checked += 1
        assert torch.equal(now, before[name]), name
    assert checked == 25


def test_merged_weights_are_those_of_peft():
    model = lm().bfloat16()
    theirs = get_peft_model(copy.deepcopy(model), LoraConfig(r=4, lora_alpha=8, target_modules=r".*(proj|lm_head)"))
    _, made = patched(model)
    factors = made.adapter_state_dict()
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            mine = name.removeprefix("base_model.model.").replace(".default.weight", "")
            parameter.data.copy_(factors[mine])
    plain = theirs.merge_and_unload()
    made.bake()
    assert same(weights(plain), weights(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_computes_the_same_and_comes_out_bit_for_bit(dtype):
    model, made = patched(lm().to(dtype).eval())
    before, all_before = weights(model), state(model)
    logits = model(IDS)
    objects = [id(p) for p in model.parameters()]
    made.merge()
    assert made.merged and objects == [id(p) for p in model.parameters()]
    tolerance = {} if dtype == torch.float32 else {"atol": 0.03, "rtol": 0.03}
    torch.testing.assert_close(model(IDS), logits, **tolerance)
    assert not torch.equal(model.lm_head.weight, before["lm_head.weight"])
    made.unmerge()
    assert not made.merged and same(weights(model), before) and state(model) == all_before
    assert torch.equal(model(IDS), logits)


def test_merged_it_costs_nothing_and_trains_nothing():
    model, made = patched()
    made.merge()
    assert all(not m._lora for m in model.modules() if hasattr(m, "_lora"))
    assert set(made.adapter_state_dict()) < set(model.state_dict())
    assert not model(IDS).requires_grad and len(made.trainable_parameters()) == 50


def test_training_goes_on_after_unmerging_as_if_nothing_had_been():
    def train(model, steps):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(steps):
            optimizer.zero_grad()
            model(IDS).pow(2).mean().backward()
            optimizer.step()

    (one, _), (two, merging) = patched(), patched()
    train(one, 2)
    train(two, 1)
    merging.merge()
    two(IDS)
    merging.unmerge()
    train(two, 1)
    assert same(weights(one), weights(two))


def test_bake_leaves_a_plain_model():
    model, plain = lm().eval(), lm()
    before = state(model)
    patch(model)
    made = graphpatch.patches(model)[0]
    randomise(made)
    logits = model(IDS)
    made.bake()
    after = state(model)
    strip = [[line[:4] if len(line) == 5 else line for line in lines] for lines in (before, after)]
    assert strip[0] == strip[1]  # all but the values
    assert graphpatch.patches(model) == [] and type(model.lm_head) is nn.Linear
    assert model.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(model(IDS), logits)
    refused("GP509", made.merge)
    pickle.loads(pickle.dumps(model))


def test_baking_a_merged_patch_keeps_its_weights():
    model, made = patched()
    made.merge()
    merged = model.lm_head.weight.clone()
    made.bake()
    assert torch.equal(model.lm_head.weight, merged) and not hasattr(model.lm_head, "lora_A")


# ── states ──


def test_merging_twice_and_unmerging_what_is_not_merged():
    model, made = patched()
    refused("GP532", made.unmerge)
    made.merge()
    before = weights(model)
    refused("GP532", made.merge, "merged already")
    assert same(before, weights(model))


def test_revert_unmerges_first():
    model = lm()
    before = state(model)
    _, made = patched(model)
    made.merge()
    made.revert()
    assert state(model) == before


def test_what_was_not_kept_comes_from_the_base():
    model, made = patched()
    base, before = lm().state_dict(), weights(model)
    made.merge(keep=False)
    merged = weights(model)
    for call in (made.unmerge, made.revert, made.disabled().__enter__):
        refused("GP532", call, "unmerge(base=DIR)")
    assert same(weights(model), merged)
    made.unmerge(base)
    assert same(weights(model), before) and not made.merged


def test_a_base_that_does_not_fit_changes_nothing():
    model, made = patched()
    made.merge(keep=False)
    merged = weights(model)
    for base in ({}, lm(hidden=8).state_dict(), dict.fromkeys(lm().state_dict(), 3)):
        with pytest.raises(graphpatch.Error) as caught:
            made.unmerge(base)
        assert caught.value.code.startswith("GP64")
        assert same(weights(model), merged) and made.merged


def test_disabled_shows_the_base_and_gives_the_merged_weights_back():
    model, made = patched()
    plain = lm().eval()(IDS)
    made.merge()
    merged, logits = weights(model), model(IDS)
    with made.disabled():
        assert torch.equal(model(IDS), plain)
        refused("GP509", made.unmerge)
        refused("GP509", made.merge)
    assert same(weights(model), merged) and torch.equal(model(IDS), logits)
    made.unmerge()
    with made.disabled():
        refused("GP509", made.merge)


def test_copies_and_pickles_of_a_merged_model_come_out_by_themselves():
    model, made = patched()
    before = weights(model)
    made.merge()
    merged = weights(model)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(stream, weights_only=False)):
        (theirs,) = graphpatch.patches(other)
        assert theirs.merged and same(weights(other), merged)
        theirs.unmerge()
        assert same(weights(other), before)
    assert made.merged and same(weights(model), merged)


def test_weights_changed_since_are_not_overwritten():
    model, made = patched()
    made.merge()
    with torch.no_grad():
        model.lm_head.weight[3, 3] += 1
    after = weights(model)
    for call in (made.unmerge, made.revert, made.disabled().__enter__):
        refused("GP534", call, "lm_head.weight", "unmerge(base=DIR)")
    assert same(weights(model), after)
    made.unmerge(base=lm().state_dict())
    assert torch.equal(model.lm_head.weight, lm().lm_head.weight)


def test_moved_to_another_dtype_it_still_comes_out():
    model, made = patched(lm().bfloat16())
    base = weights(model)["lm_head.weight"]
    made.merge()
    model.float()
    made.unmerge()
    assert torch.equal(model.lm_head.weight, base.float())


def test_a_merged_patch_saves_and_loads_no_weights(tmp_path):
    model, made = patched()
    made.merge()
    refused("GP532", lambda: graphpatch.save_adapter(made, tmp_path / "a"), "patch.unmerge()")
    refused("GP532", lambda: graphpatch.load_weights(made, made.adapter_state_dict()), "patch.unmerge()")
    made.unmerge()
    graphpatch.save_adapter(made, tmp_path / "a")
    made.merge()
    refused("GP532", lambda: graphpatch.load_adapter(model, tmp_path / "a"), "patch.unmerge()")


# ── several patches ──


def test_the_last_in_is_the_first_out():
    model, first = patched()
    zero = weights(model)
    second = patch(model, TWO, adapter="two")
    randomise(second)
    both = model(IDS)
    first.merge()
    one = weights(model)
    torch.testing.assert_close(model(IDS), both)
    second.merge()
    torch.testing.assert_close(model(IDS), both)
    for call in (first.unmerge, first.revert, first.disabled().__enter__):
        refused("GP532", call, "merged later", "lora(rank=4")
    refused("GP532", second.bake, "merged earlier")
    second.unmerge()
    assert all(torch.equal(one[k], v) for k, v in weights(model).items())
    first.unmerge()
    assert all(torch.equal(zero[k], v) for k, v in weights(model).items() if k in zero)
    assert torch.equal(model(IDS), both)


def test_of_different_weights_any_comes_out_first():
    model = lm().eval()
    q, k = (patch(model, f"patch {name} with lora(rank=4)\nfreeze ** except @new") for name in ("q_proj", "k_proj"))
    randomise(q)
    randomise(k)
    before = weights(model)
    q.merge()
    k.merge()
    q.unmerge()
    k.unmerge()
    assert same(before, weights(model))


def test_from_the_base_the_earlier_ones_are_merged_once_more():
    model, first = patched()
    second = patch(model, TWO, adapter="two")
    randomise(second)
    first.merge(keep=False)
    one = weights(model)
    second.merge(keep=False)
    second.unmerge(base=lm().state_dict())
    assert same(one, weights(model)) and first.merged


def test_a_patch_applied_to_a_merged_model_stands_beside_it():
    model, first = patched()
    first.merge()
    second = patch(model, TWO, adapter="two")
    randomise(second)
    logits = model(IDS)
    first.unmerge()
    torch.testing.assert_close(model(IDS), logits)
    second.revert()
    first.revert()
    assert same(weights(model), weights(lm()))


def test_two_rules_on_one_weight_are_rounded_once():
    model = lm().bfloat16()
    text = 'patch q_proj with lora(rank=4, adapter="a") then lora(rank=2, adapter="b")\nfreeze ** except @new'
    _, made = patched(model, text)
    q = model.model.layers[0].self_attn.q_proj
    want = (q.weight.float() + q.lora_B_a @ q.lora_A_a + q.lora_B_b @ q.lora_A_b).bfloat16()
    made.merge()
    assert torch.equal(q.weight, want)


# ── what cannot be ──


def test_ops_that_are_no_change_of_a_weight_are_named():
    for text in (
        "patch lm_head with lora(rank=4)\npatch embed_tokens with scale.output(2.0)",
        "patch lm_head with lora(rank=4)\npatch :Dropout with set(p=0.5)",
    ):
        model = lm()
        made = patch(model, text)
        before = state(model)
        refused("GP531", made.merge, text.rpartition("with ")[2].partition("(")[0], "rule file of its own")
        refused("GP531", made.bake)
        assert state(model) == before


def test_a_file_that_only_freezes_has_nothing_to_merge():
    refused("GP531", patch(lm(), "freeze **").merge, "nothing to merge")


def test_a_meta_model_has_nothing_to_merge_into():
    refused("GP531", patch(meta_lm()).merge, "meta device")


def test_a_weight_that_was_tied_since_is_refused():
    model, made = patched()
    model.model.embed_tokens.weight = model.lm_head.weight
    before = weights(model)
    refused("GP531", made.merge, "embed_tokens.weight", "lm_head.weight")
    assert same(before, weights(model))


def test_a_parametrised_weight_is_refused():
    model = lm()
    torch.nn.utils.parametrizations.weight_norm(model.lm_head)
    refused("GP531", patch(model, "patch lm_head with lora(rank=2)").merge, "parametrization")


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("where", ["factor", "weight", "too large"])
def test_a_nan_or_infinity_is_found_before_anything_is_changed(keep, where):
    model, made = patched(lm().half())
    last = model.lm_head
    with torch.no_grad():
        if where == "factor":
            last.lora_B[1, 1] = float("nan")
        elif where == "weight":
            last.weight[1, 1] = float("inf")
        else:
            last.lora_B.fill_(6e3)
            last.lora_A.fill_(6e3)
    before = {k: v.view(torch.int16) if v.dtype == torch.half else v for k, v in weights(model).items()}
    refused("GP533", lambda: made.merge(keep=keep), "lm_head.weight")
    after = {k: v.view(torch.int16) if v.dtype == torch.half else v for k, v in weights(model).items()}
    assert all(torch.equal(before[k].nan_to_num(), after[k].nan_to_num()) for k in before)
    assert not made.merged and last._lora


def test_large_factors_that_cancel_are_merged():
    model, made = patched(lm().half(), "patch lm_head with lora(rank=2)\nfreeze ** except @new")
    head = model.lm_head
    with torch.no_grad():
        head.lora_A.fill_(300.0)
        head.lora_B.copy_(torch.tensor([300.0, -300.0]).expand(32, 2))
    before = head.weight.clone()
    made.merge()
    assert torch.equal(head.weight, before)


def test_failing_half_way_leaves_all_as_it_was(monkeypatch):
    from graphpatch.patch import merge as module

    model, made = patched()
    before = state(model)
    real, calls = module.merge_into, []

    def failing(weight):
        calls.append(weight)
        real(weight)
        if len(calls) == 9:
            raise MemoryError("no room")

    monkeypatch.setattr(module, "merge_into", failing)
    refused("GP533", made.merge, "as they were", "no room")
    assert state(model) == before and not made.merged


# ── surroundings ──


def test_in_inference_mode_and_under_autocast_the_same_bits():
    results = []
    for context in (torch.enable_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        model, made = patched()
        with context:
            made.merge()
        results.append(weights(model))
        made.unmerge()
        assert same(weights(model), weights(patched()[0]))
    assert same(results[0], results[1]) and same(results[0], results[2])


def test_a_model_made_in_inference_mode_is_merged():
    with torch.inference_mode():
        model = lm()
    _, made = patched(model)
    before = weights(model)
    made.merge()
    assert not torch.equal(model.lm_head.weight, before["lm_head.weight"])
    made.unmerge()
    assert same(before, weights(model))


def test_precision_of_the_caller_is_not_that_of_the_merge():
    model, made = patched()
    torch.set_float32_matmul_precision("medium")
    try:
        made.merge()
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    other, again = patched()
    again.merge()
    assert same(weights(model), weights(other))


def test_channels_last_is_merged_like_any_layout():
    weight = {}
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(4, 6, 3)).to(memory_format=layout)
        _, made = patched(model, "patch ^0 with lora(rank=2)\nfreeze **")
        before = model[0].weight.clone()
        made.merge()
        weight[layout] = model[0].weight.clone()
        made.unmerge()
        assert torch.equal(model[0].weight, before) and not torch.equal(weight[layout], before)
    assert torch.equal(*weight.values())


def test_a_compiled_model_goes_on():
    model, _ = patched()
    compiled = torch.compile(model, backend="eager")
    (handle,) = graphpatch.patches(compiled)
    before = compiled(IDS)
    handle.merge()
    torch.testing.assert_close(compiled(IDS), before)
    handle.unmerge()
    assert torch.equal(compiled(IDS), before)


def test_weights_that_a_loaded_adapter_brought_stay_where_they_are(tmp_path):
    text = LORA + "\ntrain :*Norm"
    model, made = patched(text=text)
    with torch.no_grad():
        model.model.norm.weight.add_(0.5)
    graphpatch.save_adapter(made, tmp_path)
    other = lm().eval()
    loaded = graphpatch.load_adapter(other, tmp_path)
    loaded.merge()
    torch.testing.assert_close(other(IDS), model(IDS))
    loaded.bake()
    torch.testing.assert_close(other(IDS), model(IDS))
    assert torch.equal(other.model.norm.weight, model.model.norm.weight)


def test_flags_are_left_alone_and_baking_gives_the_old_ones_back():
    model = lm()
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    _, made = patched(model)
    during = {name: p.requires_grad for name, p in model.named_parameters()}
    made.merge()
    assert during == {name: p.requires_grad for name, p in model.named_parameters()}
    made.bake()
    assert flags == {name: p.requires_grad for name, p in model.named_parameters()}


def test_a_large_model_of_few_kinds():
    model = LM(layers=2, hidden=600, vocabulary=1500).bfloat16()
    _, made = patched(model)
    head = model.lm_head
    want = (head.weight.float() + (head.lora_B @ head.lora_A) * 2).bfloat16()
    made.merge()
    assert torch.equal(head.weight, want)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("kind", ["linear", "Conv1D", "embedding"])
def test_dora_is_merged_exactly_however_often_it_is_looked_at(kind, keep):
    torch.manual_seed(0)
    module, batch = {
        "linear": (nn.Linear(6, 10), torch.randn(3, 6)),
        "Conv1D": (Conv1D(10, 6), torch.randn(3, 6)),
        "embedding": (nn.Embedding(10, 6), torch.arange(10)),
    }[kind]
    model, made = patched(nn.Sequential(module), "patch ^0 with lora(rank=2, dora=true)\nfreeze ** except @new")
    before, out = module.weight.clone(), model(batch)
    made.merge(keep=keep)
    torch.testing.assert_close(model(batch), out)
    if keep:
        made.unmerge()
        assert torch.equal(module.weight, before)
