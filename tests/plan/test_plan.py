"""The plan as data: sums, printing, saving, drift, params, `when`."""

from __future__ import annotations

import json

import pytest

import graphpatch
from tests.toys import lm, meta_lm

LORA = """
param rank: int = 2
patch layers[*].self_attn.{q,k,v,o}_proj with lora(rank=$rank, alpha=4) expect 4 per layers[*]
freeze ** except @new
"""


def test_the_sums_are_those_of_the_patched_model():
    model = lm(layers=3)
    before = sum(p.numel() for p in model.parameters())
    keys = set(model.state_dict())
    plan = graphpatch.parse(LORA).plan(model)
    plan.apply(model)
    totals = plan.totals
    assert totals.parameters_before == before
    assert totals.parameters_after == sum(p.numel() for p in model.parameters())
    assert totals.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert totals.keys_added == len(set(model.state_dict()) - keys) and keys < set(model.state_dict())
    assert totals.bytes_added == sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)


def test_it_prints_rules_paths_and_sums():
    text = str(graphpatch.parse(LORA).plan(meta_lm(layers=3)))
    assert "LM (meta, 33 modules" in text or "LM (meta," in text
    assert "rank = 2" in text and "lora(rank=2, alpha=4)" in text
    assert "12 modules" in text and "4 x 3" in text
    assert "~ ^model.layers[0:3].self_attn.{q,k,v,o}_proj" in text.replace("{k,o,q,v}", "{q,k,v,o}")
    assert "Plan: 12 to rewrite, 0 to replace, 0 to add." in text and "24 keys added, 0 moved" in text
    assert "\x1b" not in text


def test_every_printed_path_pastes_back_as_a_selector():
    model = meta_lm(layers=5)
    plan = graphpatch.parse("patch layers[1::2].**:Linear | ^lm_head with lora(rank=1)").plan(model)
    printed = [line.split()[1] for line in str(plan).splitlines() if line.startswith("  ~ ")]
    pasted = {path for selector in printed for path in graphpatch.select(model, selector)}
    assert pasted == {c.path for c in plan.changes}


def test_changes_are_a_sequence():
    changes = graphpatch.parse(LORA).plan(meta_lm(layers=3)).changes
    assert len(changes) == 12 and changes[0].path == "model.layers.0.self_attn.q_proj"
    assert changes[-1].path == list(changes)[-1].path and len(changes[2:5]) == 3
    assert changes[0].op == "lora(rank=2, alpha=4)" and changes[0].rule.endswith(":3")
    with pytest.raises(IndexError):
        changes[12]


def test_json_has_a_version_and_reads_back_to_the_same_plan():
    plan = graphpatch.parse(LORA, rank=3).plan(meta_lm(layers=3))
    text = plan.to_json()
    body = json.loads(text)
    assert body["format"] == 1 and body["params"] == {"rank": 3}
    assert body["changes"][0]["count"] == 12
    again = graphpatch.Plan.from_json(text)
    assert again.to_json() == text and again.id == plan.id


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"format": 1}', "\x00", "[" * 100_000])
def test_what_is_no_plan_is_refused(text):
    with pytest.raises(graphpatch.Error) as caught:
        graphpatch.Plan.from_json(text)
    assert caught.value.code == "GP418"


def test_an_edited_plan_is_refused():
    body = json.loads(graphpatch.parse(LORA).plan(meta_lm(layers=3)).to_json())
    body["changes"][0]["paths"] = ["^model.layers[0:2].self_attn.{q,k,v,o}_proj"]
    with pytest.raises(graphpatch.PlanError) as caught:
        graphpatch.Plan.from_json(json.dumps(body))
    assert caught.value.code == "GP419"


def test_a_saved_plan_applies_and_refuses_a_tree_that_drifted():
    text = graphpatch.parse(LORA).plan(meta_lm(layers=3)).to_json()
    model = lm(layers=3)
    patch = graphpatch.Plan.from_json(text).apply(model)
    assert "model.layers.2.self_attn.o_proj.lora_B" in model.state_dict()
    patch.revert()
    drifted = lm(layers=3, value=lambda i: i < 2)
    with pytest.raises(graphpatch.Error) as caught:
        graphpatch.Plan.from_json(text).apply(drifted)
    assert caught.value.code == "GP421" and "model.layers[2].self_attn.v_proj" in str(caught.value)
    assert not any("lora" in key for key in drifted.state_dict())


def test_the_plan_of_a_patched_model_says_what_is_there():
    model = lm(layers=3)
    rules = graphpatch.parse(LORA)
    first = rules.plan(model)
    first.apply(model)
    second = rules.plan(model)
    assert len(second.changes) == 0 and sum(len(s.nodes) for s in second.already) == 12
    assert second.id == first.id and "  = " in str(second) and "12 already applied" in str(second)
    assert second.totals.parameters_after == sum(p.numel() for p in model.parameters())
    with pytest.raises(graphpatch.PlanError) as caught:
        graphpatch.parse("patch q_proj with lora(rank=8)").plan(model)
    assert caught.value.code == "GP417"


def test_params_are_typed_and_computed():
    text = "param rank: int = 2\nparam alpha: float = 2 * $rank\npatch q_proj with lora(rank=$rank, alpha=$alpha)"
    plan = graphpatch.parse(text, rank=8).plan(meta_lm())
    assert plan.params == {"rank": 8, "alpha": 16.0}
    with pytest.raises(graphpatch.RuleError):
        graphpatch.parse(text, rank="8")
    with pytest.raises(graphpatch.RuleError):
        graphpatch.parse(text, rnak=8)


def test_a_missing_config_key_is_none_for_is_and_equals_and_an_error_elsewhere():
    tree = graphpatch.Tree.of(meta_lm())
    plan = graphpatch.parse("when config.sliding_window is none { patch q_proj with lora(rank=1) }").plan(tree)
    assert len(plan.changes) == 4
    assert len(graphpatch.parse('when config.kind == "x" { patch q_proj with lora(rank=1) }').plan(tree).changes) == 0
    with pytest.raises(graphpatch.PlanError) as caught:
        graphpatch.parse("patch q_proj with lora(rank=config.hiden_size)").plan(tree)
    assert "hidden_size" in str(caught.value)


def test_when_and_require_and_queries():
    tree = graphpatch.Tree.of(meta_lm())
    text = "when has(^decoder.layers) { patch nothing with lora(rank=1) }\nwhen count(layers[*]) == 4 { patch q_proj with lora(rank=1) }"
    assert len(graphpatch.parse(text).plan(tree).changes) == 4
    with pytest.raises(graphpatch.PlanError) as caught:
        graphpatch.parse("require has(encoder)\npatch q_proj with lora(rank=1)").plan(tree)
    assert caught.value.code == "GP440"


def test_explain_says_which_rule_touches_and_where_others_stop():
    text = """
patch layers[0:2].self_attn.{q,v}_proj with lora(rank=2)
patch layers[2:].self_attn.q_proj with lora(rank=4)
patch mlp.up_proj:Linear where out_features > 99 with lora(rank=8) expect any
patch o_proj with lora(rank=1) except layers[0]
freeze ** except @new
"""
    model, rules = meta_lm(), graphpatch.parse(text)
    said = graphpatch.explain(model, rules, "model.layers.0.self_attn.q_proj")
    assert [v.touches for v in said.verdicts] == [True, False, False, False, True]
    assert "lora(rank=2)" in said.verdicts[0].text
    assert said.verdicts[1].text == "`layers[2:]` leaves out model.layers.0"
    up = graphpatch.explain(model, rules, "model.layers.0.mlp.up_proj")
    assert "where out_features > 99" in up.verdicts[2].text
    out = graphpatch.explain(model, rules, "model.layers.0.self_attn.o_proj")
    assert "except layers[0]" in out.verdicts[3].text
    with pytest.raises(graphpatch.PlanError) as caught:
        graphpatch.explain(model, rules, "model.layers.0.self_attn.qproj")
    assert "q_proj" in str(caught.value)


def test_select():
    model = meta_lm(layers=2)
    assert graphpatch.select(model, "layers[1].mlp.{up,down}_proj") == [
        "model.layers.1.mlp.up_proj",
        "model.layers.1.mlp.down_proj",
    ]
    assert graphpatch.select(model, "@head") == ["lm_head"]
    assert graphpatch.select(model, "no_such") == []
    assert graphpatch.select(model, "^") == [""]


def test_a_single_pattern_may_be_a_string_and_permits_no_more_than_it_says():
    model = lm(layers=1)
    rules = graphpatch.parse('patch ^model.norm with replace(class="torch.nn.Identity")')
    for applied in (
        lambda: graphpatch.apply(model, rules, allow_import="mypkg.*"),
        lambda: rules.plan(model, allow_import="mypkg.*").apply(model),
        lambda: rules.plan(model).apply(model, allow_import="mypkg.*"),
    ):
        with pytest.raises(graphpatch.ApplyError) as caught:
            applied()
        assert caught.value.code == "GP505"
    graphpatch.apply(model, rules, allow_import="torch.nn.*")
    assert type(model.model.norm).__name__ == "Identity"


def test_a_plan_from_a_file_permits_nothing():
    model = lm(layers=1)
    rules = graphpatch.parse('patch ^model.norm with replace(class="torch.nn.Identity")')
    text = rules.plan(model, allow_import=["torch.nn.*"]).to_json()
    assert "torch.nn.*" not in text
    with pytest.raises(graphpatch.ApplyError) as caught:
        graphpatch.Plan.from_json(text).apply(model)
    assert caught.value.code == "GP505"
    graphpatch.Plan.from_json(text).apply(model, allow_import=["torch.nn.*"])
    assert type(model.model.norm).__name__ == "Identity"
