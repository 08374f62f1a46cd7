"""`freeze` and `train`, held against a naive reading on the model itself."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import graphpatch
from tests.toys import lm, meta_lm


def trainable(text: str, model=None) -> set[str]:
    model = model or lm(layers=3)
    plan = graphpatch.parse(text).plan(model)
    plan.apply(model)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert plan.trainable == count
    return names


def test_new_parameters_alone():
    names = trainable("patch q_proj with lora(rank=2)\nfreeze ** except @new")
    assert names == {f"model.layers.{i}.self_attn.q_proj.lora_{x}" for i in range(3) for x in "AB"}


def test_freeze_without_exception_freezes_what_was_added():
    assert trainable("patch q_proj with lora(rank=2)\nfreeze **") == set()


def test_the_last_one_wins_in_file_order():
    names = trainable("freeze **\ntrain layers[-1:] | ^lm_head\nfreeze layers[-1:].mlp")
    assert "lm_head.weight" in names and "model.layers.2.self_attn.q_proj.weight" in names
    assert not any("mlp" in name or "layers.1" in name for name in names)


def test_bias_and_norms_by_name_and_class():
    assert trainable("freeze **\ntrain bias") == {
        f"model.layers.{i}.mlp.{p}_proj.bias" for i in range(3) for p in ("up", "down")
    }
    assert all("norm" in name for name in trainable("freeze **\ntrain :*Norm"))


def test_added_parameters_can_be_named():
    names = trainable("patch q_proj with lora(rank=2)\nfreeze ** except @new\nfreeze lora_A")
    assert names == {f"model.layers.{i}.self_attn.q_proj.lora_B" for i in range(3)}
    assert trainable("patch q_proj with lora(rank=2)\nfreeze **\ntrain @new") == trainable(
        "patch q_proj with lora(rank=2)\nfreeze ** except @new"
    )


def test_an_except_keeps_what_was_decided_before():
    names = trainable("freeze **\ntrain bias\nfreeze layers[0] except layers[0].mlp.up_proj.bias")
    assert "model.layers.0.mlp.up_proj.bias" in names and "model.layers.0.mlp.down_proj.bias" not in names


def test_a_tied_parameter_is_one():
    assert trainable("freeze ^lm_head", lm(layers=1, tied=True)).isdisjoint(
        {"lm_head.weight", "model.embed_tokens.weight"}
    )
    names = trainable("freeze ** except ^lm_head", lm(layers=1, tied=True))
    assert names == {"model.embed_tokens.weight"}


def test_buffers_and_other_state_are_left_alone():
    model = lm(layers=1)
    model.register_buffer("steps", torch.zeros(1))
    trainable("freeze **", model)
    assert "steps" in dict(model.named_buffers()) and not model.steps.requires_grad


def test_a_file_that_adds_and_freezes_nothing_is_warned_about():
    plan = graphpatch.parse("patch q_proj with lora(rank=2)").plan(meta_lm())
    assert [w.code for w in plan.warnings] == ["GP420"]
    assert graphpatch.parse("patch q_proj with lora(rank=2)\nfreeze ** except @new").plan(meta_lm()).warnings == []


def test_train_as_names_an_optimizer_group():
    plan = graphpatch.parse("freeze **\ntrain bias as biases\ntrain :*Norm as norms").plan(meta_lm(layers=2))
    assert plan.groups["biases"] == ["^model.layers[0:2].mlp.{up,down}_proj.bias"]
    assert len(plan.groups) == 2


STATEMENTS = [
    ("freeze", "**", None),
    ("train", "**", None),
    ("freeze", "**", "@new"),
    ("train", "bias", None),
    ("freeze", "layers[0]", None),
    ("train", "layers[1:].mlp", None),
    ("freeze", "mlp", "bias"),
    ("train", "@new", None),
    ("freeze", "lora_A", None),
    ("train", ":RMSNorm", "layers[2]"),
    ("freeze", "^lm_head", None),
    ("train", "**", "^model.embed_tokens"),
]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(STATEMENTS), min_size=1, max_size=5), st.booleans())
def test_any_order_agrees_with_a_naive_reading(statements, tied):
    model = lm(layers=3, hidden=4, vocabulary=8, tied=tied)
    text = "patch up_proj with lora(rank=1)\n" + "\n".join(
        f"{verb} {what}" + (f" except {but}" if but else "") for verb, what, but in statements
    )
    names = trainable(text, model)
    assert names == set(_naive(model, statements))


def _naive(model, statements) -> list[str]:
    modules = {id(m): n for n, m in model.named_modules()}
    assert modules
    state: dict[int, bool] = {id(p): True for p in model.parameters()}
    for verb, what, but in statements:
        hit = _covered(model, what)
        spared = _covered(model, but) if but else set()
        for parameter in hit - spared:
            state[parameter] = verb == "train"
    return [name for name, p in model.named_parameters() if state[id(p)]]


def _covered(model, selector: str) -> set[int]:
    def below(module) -> set[int]:
        return {id(p) for p in module.parameters()}

    named = dict(model.named_parameters(remove_duplicate=False))
    if selector == "**":
        return below(model)
    if selector == "@new":
        return {id(p) for n, p in named.items() if "lora_" in n}
    if selector in ("bias", "lora_A"):
        return {id(p) for n, p in named.items() if n.endswith("." + selector)}
    if selector == "layers[0]":
        return below(model.model.layers[0])
    if selector == "layers[2]":
        return below(model.model.layers[2])
    if selector == "layers[1:].mlp":
        return below(model.model.layers[1].mlp) | below(model.model.layers[2].mlp)
    if selector == "mlp":
        return set().union(*(below(layer.mlp) for layer in model.model.layers))
    if selector == ":RMSNorm":
        return set().union(*(below(m) for m in model.modules() if type(m).__name__ == "RMSNorm"))
    if selector == "^lm_head":
        return below(model.lm_head)
    assert selector == "^model.embed_tokens"
    return below(model.model.embed_tokens)


def test_an_optimizer_group_is_told_by_its_rule():
    plan = graphpatch.parse("freeze **\ntrain layers[-1:].mlp as late").plan(meta_lm(layers=3))
    assert plan.outcomes[1].text == "train layers[-1:].mlp as late"
    assert "optimizer group late: ^model.layers[2].mlp" in str(plan)
