"""Two rules on one node."""

from __future__ import annotations

import pytest

import graphpatch
from tests.toys import meta_lm


@pytest.fixture(scope="module")
def tree():
    return graphpatch.Tree.of(meta_lm(layers=4))


def plan(text: str, tree):
    return graphpatch.parse(text).plan(tree)


def refusal(text: str, tree) -> graphpatch.Error:
    with pytest.raises(graphpatch.PlanError) as caught:
        plan(text, tree)
    return caught.value


def test_two_rules_on_one_node_are_an_error_that_shows_both(tree):
    error = refusal("patch q_proj with lora(rank=2)\npatch layers[0].self_attn.q_proj with lora(rank=4)", tree)
    assert error.code == "GP407" and "two rules change model.layers[0].self_attn.q_proj" in str(error)
    assert "overrides base" in str(error) and "adapter=" in str(error)
    assert [p.span.line for p in error.diagnostics[0].places] == [1, 2]


def test_overrides_wins_on_what_the_two_share(tree):
    text = "patch q_proj with lora(rank=2) as base expect 4\npatch layers[0].**.q_proj with lora(rank=4) overrides base"
    by_path = {c.path: c.op for c in plan(text, tree).changes}
    assert by_path["model.layers.0.self_attn.q_proj"] == "lora(rank=4)"
    assert by_path["model.layers.1.self_attn.q_proj"] == "lora(rank=2)" and len(by_path) == 4


def test_overriding_nothing_is_an_error(tree):
    text = "patch q_proj with lora(rank=2) as base\npatch k_proj with lora(rank=4) overrides base"
    assert refusal(text, tree).code == "GP414"


def test_the_order_of_rules_is_irrelevant(tree):
    one = "patch q_proj with lora(rank=2) as base"
    two = "patch layers[0].**.q_proj with lora(rank=4) overrides base"
    forward = {(c.path, c.op) for c in plan(f"{one}\n{two}", tree).changes}
    assert forward == {(c.path, c.op) for c in plan(f"{two}\n{one}", tree).changes}


def test_adapters_of_two_names_compose(tree):
    text = 'patch q_proj with lora(rank=2, adapter="math")\npatch q_proj with lora(rank=4, adapter="code")'
    assert len(plan(text, tree).changes) == 8
    assert plan(text, tree).totals.keys_added == 16


def test_then_against_the_levels_is_an_error(tree):
    assert refusal("patch q_proj with scale.output(2.0) then lora(rank=2)", tree).code == "GP416"
    assert len(plan("patch q_proj with lora(rank=2) then scale.output(2.0)", tree).changes) == 8


def test_below_a_replaced_module_nothing_else_may_be_patched(tree):
    text = 'patch layers[0].mlp with replace(class="mypkg.MLP")\npatch up_proj with lora(rank=2)'
    assert refusal(text, tree).code == "GP415"
    text = 'patch layers[0].mlp with replace(class="mypkg.MLP")\npatch up_proj with lora(rank=2) except layers[0]'
    assert len(plan(text, tree).changes) == 4


def test_an_unknown_op_and_argument_have_a_suggestion(tree):
    assert "did you mean `lora`?" in str(refusal("patch q_proj with loraa(rank=2)", tree))
    error = refusal("patch q_proj with lora(rnak=2)", tree)
    assert error.code == "GP203" and "did you mean `rank`?" in str(error)
    assert "rank" in str(refusal("patch q_proj with lora(r=2)", tree))
    assert refusal("patch q_proj with lora(rank=0)", tree).code == "GP204"
    assert refusal('patch q_proj with lora(rank="16")', tree).code == "GP204"


def test_an_op_that_refuses_names_the_target_and_the_fix(tree):
    error = refusal("patch embed_tokens with scale.output(2.0)\npatch norm with lora(rank=2)", tree)
    assert "RMSNorm" in str(error) and "Linear" in str(error)


def test_a_parameter_is_no_module(tree):
    error = refusal("patch q_proj.weight with lora(rank=2)", tree)
    assert "parameter" in str(error)
