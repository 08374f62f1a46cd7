import json

import pytest

from graphpatch import Plan

LORA = """\
param rank: int = 4
patch layers[*].self_attn.{q,v}_proj with lora(rank=$rank) expect 2 per layers[*]
freeze ** except @new
"""


def test_from_a_config_and_from_its_tree_it_is_the_same_plan(graphpatch, rules, llama, llama_tree):
    path = rules(LORA)
    built, read = (graphpatch("plan", path, "--model", m) for m in (llama, llama_tree))
    assert built.code == read.code == 0
    assert built.out == read.out
    assert "^model.layers[0:4].self_attn.{q,v}_proj" in built.out and "8 modules" in built.out
    # rank 4, four layers: q is 64 -> 64, v is 64 -> 32
    assert "Trainable 3.58 k" in built.out and 4 * 4 * (64 + 64 + 64 + 32) == 3584
    assert graphpatch("plan", path, "--model", llama / "config.json").out == built.out


def test_a_packaged_file_by_name_with_its_params(graphpatch, llama_tree):
    ran = graphpatch("plan", "lora", "--model", llama_tree, "--set", "rank=2", "--set", "dropout=0.1")
    assert ran.code == 0
    assert "lora(rank=2, alpha=4, dropout=0.1)" in ran.out and "16 modules" in ran.out


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("rank=x", "takes an int"),
        ("rank=2.5", "takes an int"),
        ("rnak=2", "did you mean `rank`?"),
        ("rank", "NAME=VALUE"),
    ],
)
def test_a_setting_that_does_not_fit(graphpatch, llama_tree, setting, said):
    ran = graphpatch("plan", "lora", "--model", llama_tree, "--set", setting)
    assert ran.code == 1 and said in ran.err and ran.out == ""


def test_verbose_lists_every_path(graphpatch, rules, llama_tree):
    out = graphpatch("plan", rules(LORA), "--model", llama_tree, "-v").out
    for layer in range(4):
        assert f"^model.layers.{layer}.self_attn.q_proj" in out


def test_json_is_a_plan(graphpatch, rules, llama_tree):
    ran = graphpatch("plan", rules(LORA), "--model", llama_tree, "--json")
    assert ran.code == 0 and ran.err == ""
    assert json.loads(ran.out)["format"] == 1
    assert len(Plan.from_json(ran.out).changes) == 8


def test_a_saved_plan_reads_back(graphpatch, rules, llama_tree, tmp_path):
    saved = tmp_path / "plan.json"
    ran = graphpatch("plan", rules(LORA), "--model", llama_tree, "--out", saved, "--adapter", "math")
    assert ran.code == 0 and str(saved) in ran.err
    plan = Plan.from_json(saved.read_text())
    assert plan.adapter == "math" and plan.totals.keys_added == 16


def test_it_cannot_be_saved_where_there_is_no_directory(graphpatch, rules, llama_tree, tmp_path):
    ran = graphpatch("plan", rules(LORA), "--model", llama_tree, "--out", tmp_path / "no" / "plan.json")
    assert ran.code == 1 and "GP708" in ran.err


def test_exit_code_tells_changes_from_none(graphpatch, rules, llama_tree):
    changing, nothing = rules(LORA), rules("use roles\n", "nothing.rules")
    assert graphpatch("plan", changing, "--model", llama_tree, "--exit-code").code == 2
    assert graphpatch("plan", nothing, "--model", llama_tree, "--exit-code").code == 0
    assert graphpatch("plan", rules("freeze **", "freeze.rules"), "--model", llama_tree, "--exit-code").code == 2


@pytest.mark.parametrize("model", ["nowhere", "meta-llama/Llama-3-8B", "nowhere:build"])
def test_with_exit_code_an_error_is_never_taken_for_changes(graphpatch, rules, model):
    assert graphpatch("plan", rules(LORA), "--model", model, "--exit-code").code == 1
    assert graphpatch("plan", "nowhere.rules", "--model", model, "--exit-code").code == 1
    assert graphpatch("plan", rules(LORA), "--exit-code").code == 1


def test_what_does_not_fit_is_said_with_its_place(graphpatch, rules, llama_tree):
    path = rules("patch layers[*].self_attn.{q,w}_proj with lora(rank=4)\n")
    ran = graphpatch("plan", path, "--model", llama_tree)
    assert ran.code == 1 and ran.out == ""
    assert "`{w}` matches nothing" in ran.err and f"{path}:1:" in ran.err
    as_json = graphpatch("plan", path, "--model", llama_tree, "--json")
    assert as_json.code == 1 and json.loads(as_json.out)["findings"][0]["code"] == "GP402"


def test_wrong_rules_are_found_before_the_model_is_built(graphpatch, rules):
    ran = graphpatch("plan", rules("patch q wiht lora\n"), "--model", "nowhere")
    assert ran.code == 1 and "GP701" not in ran.err and "GP1" in ran.err


def test_colour_only_where_it_is_wanted(graphpatch, rules, llama_tree, monkeypatch):
    path = rules(LORA)
    assert "\x1b" not in graphpatch("plan", path, "--model", llama_tree).out
    monkeypatch.setenv("FORCE_COLOR", "1")
    colored = graphpatch("plan", path, "--model", llama_tree).out
    assert "\x1b[" in colored
    assert "\x1b" not in graphpatch("plan", path, "--model", llama_tree, "--json").out
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in graphpatch("plan", path, "--model", llama_tree).out


def test_the_columns_stand_straight_whatever_the_paths_length(llama_tree):
    from graphpatch import Tree, parse
    from graphpatch.plan.report import plan_text

    text = "patch layers[1,3].mlp.{gate,up}_proj | layers[0].self_attn.{q,k,v}_proj with lora(rank=2, dropout=0.05)"
    plan = parse(text + "\nfreeze ** except @new").plan(Tree.read(str(llama_tree)))
    lines = plan_text(plan).splitlines()
    starts = {
        line.index(word) for line in lines[2:-2] for word in ("7 modules", "Linear ->", "164.4 k param") if word in line
    }
    assert len(starts) == 1
    narrow = plan_text(plan, width=60).splitlines()
    assert max(map(len, narrow[2:-2])) <= max(map(len, lines[2:-2]))
