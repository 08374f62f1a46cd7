"""match, explain, tree, diff, ops, rules, and what all commands share."""

import io
import json
import os
import sys

import pytest
import torch
from torch import nn

from graphpatch import Tree
from graphpatch.cli import main as cli

# ── match ──


def test_match_prints_paths_that_paste_back(graphpatch, llama_tree):
    ran = graphpatch("match", "layers[:2].**.{q,v}_proj", "--model", llama_tree)
    assert ran.code == 0
    head, path = ran.out.splitlines()
    assert head.startswith("4 modules")
    again = graphpatch("match", path.strip(), "--model", llama_tree)
    assert again.out == ran.out


def test_match_knows_the_packaged_roles(graphpatch, llama_tree):
    assert "12 modules" in graphpatch("match", "@qkv", "--model", llama_tree).out


def test_match_json(graphpatch, llama_tree):
    ran = graphpatch("match", "^lm_head | ^lm_head.weight", "--model", llama_tree, "--json")
    body = json.loads(ran.out)
    assert body["format"] == 1 and body["modules"] == [["lm_head"]] and body["parameters"] == [["lm_head.weight"]]


def test_no_match_exits_with_1_and_says_how_near_it_was(graphpatch, llama_tree):
    ran = graphpatch("match", "layers[*].self_attn.qproj", "--model", llama_tree)
    assert ran.code == 1 and "GP401" in ran.out and "q_proj" in ran.out


def test_a_dead_alternative_is_told_though_others_match(graphpatch, llama_tree):
    ran = graphpatch("match", "{q,w}_proj", "--model", llama_tree)
    assert ran.code == 0 and "`{w}` matches nothing" in ran.out


def test_a_selector_that_is_none_exits_with_2(graphpatch, llama_tree):
    ran = graphpatch("match", "layers[0..3]", "--model", llama_tree)
    assert ran.code == 2 and ran.err.startswith("error GP104")
    assert graphpatch("match", "@nope", "--model", llama_tree).code == 2


def test_verbose_lists_every_match(graphpatch, llama_tree):
    out = graphpatch("match", "@norm", "--model", llama_tree, "-v").out
    assert "  ^model.layers.3.input_layernorm\n" in out and "  ^model.norm\n" in out


# ── explain ──


def test_explain_names_the_rules_that_touch_and_where_others_stopped(graphpatch, rules, llama_tree):
    path = rules(
        "patch layers[*].self_attn.q_proj with lora(rank=4)\n"
        "patch layers[*].mlp.up_proj with lora(rank=4)\n"
        "freeze ** except @new\n"
    )
    ran = graphpatch("explain", "model.layers.1.self_attn.q_proj", path, "--model", llama_tree)
    assert ran.code == 0
    lines = ran.out.splitlines()
    assert "Linear" in lines[0]
    assert lines[1].startswith("  ~") and ":1" in lines[1] and "lora(rank=4)" in lines[1]
    assert lines[2].startswith("   ") and ":2" in lines[2] and "layers[*]" in lines[2]


def test_explain_takes_a_path_as_a_plan_prints_it(graphpatch, llama_tree):
    plain = graphpatch("explain", "model.layers.1.mlp", "lora", "--model", llama_tree)
    assert graphpatch("explain", "^model.layers[1].mlp", "lora", "--model", llama_tree) == plain and plain.code == 0


def test_explain_of_a_path_that_is_not_there(graphpatch, llama_tree):
    ran = graphpatch("explain", "model.layers.1.self_attn.qproj", "lora", "--model", llama_tree)
    assert ran.code == 1 and "did you mean `q_proj`?" in ran.err


# ── tree ──


def test_tree_to_stdout_and_to_a_file_is_the_same(graphpatch, llama, llama_tree):
    ran = graphpatch("tree", "--model", llama)
    assert ran.code == 0 and ran.out == llama_tree.read_text()
    assert Tree.from_text(ran.out).title == "LlamaForCausalLM"


def test_a_tree_under_another_name_is_recognised(graphpatch, llama_tree, tmp_path):
    other = tmp_path / "llama.txt"
    other.write_text(llama_tree.read_text())
    assert graphpatch("match", "q_proj", "--model", other).code == 0


# ── diff ──


class Layer(nn.Module):
    def __init__(self, linear, eps):
        super().__init__()
        setattr(self, linear, nn.Linear(4, 4))
        self.norm = nn.LayerNorm(4, eps=eps)


@pytest.fixture
def two_trees(tmp_path):
    for name, linear, eps in (("old", "gate", 1e-5), ("new", "gat", 1e-6)):
        model = nn.ModuleDict({"layers": nn.ModuleList(Layer(linear, eps) for _ in range(12)), name: nn.Dropout(0.25)})
        Tree.of(model).write(str(tmp_path / f"{name}.tree"))
    return tmp_path / "old.tree", tmp_path / "new.tree"


def test_equal_models_do_not_differ(graphpatch, llama, llama_tree):
    ran = graphpatch("diff", llama, llama_tree)
    assert ran.code == 0 and ran.out.startswith("no difference")


def test_what_happened_to_each_layer_alike_is_one_line(graphpatch, two_trees):
    ran = graphpatch("diff", *two_trees)
    assert ran.code == 1
    signs = {line[0]: line for line in ran.out.splitlines()[:-1]}
    assert "eps: 1e-05 -> 1e-06" in signs["~"] and "^layers[0:12].norm" in signs["~"]
    assert any(line.startswith("> ^layers[0:12].gate -> ^layers[0:12].gat ") for line in ran.out.splitlines())
    assert len(ran.out.splitlines()) == 4


def test_diff_json(graphpatch, two_trees):
    body = json.loads(graphpatch("diff", *two_trees, "--json").out)
    assert body["format"] == 1 and body["renamed"] and body["config"] == {}


def test_what_a_config_changed(graphpatch, llama, tmp_path):
    entries = json.loads((llama / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(entries | {"rms_norm_eps": 1e-5, "num_hidden_layers": 5}))
    out = graphpatch("diff", llama, tmp_path).out
    assert "~ config.num_hidden_layers   4 -> 5" in out
    assert "+ ^model.layers[4].mlp" in out


def test_diff_that_cannot_run_is_no_difference(graphpatch, llama_tree):
    assert graphpatch("diff", llama_tree, "nowhere.tree").code == 2


# ── ops and rules ──


def test_ops_lists_all_and_shows_one_in_full(graphpatch):
    listed = graphpatch("ops")
    assert listed.code == 0
    assert {line.split()[0] for line in listed.out.splitlines()} >= {"lora", "set", "scale.output", "replace", "wrap"}
    page = graphpatch("ops", "lora").out
    for said in (
        "lora(rank=8",
        "whole number, at least 1 (default 8)",
        "arXiv:2106.09685",
        "torch.nn.modules.linear.Linear",
    ):
        assert said in page


def test_an_argument_that_must_be_given_is_told_apart(graphpatch):
    assert "by           number (required)" in graphpatch("ops", "scale.output").out


def test_an_unknown_op_or_file_names_the_nearest(graphpatch):
    ran = graphpatch("ops", "loar")
    assert ran.code == 2 and "did you mean `lora`?" in ran.err
    ran = graphpatch("rules", "role")
    assert ran.code == 2 and "did you mean `roles`?" in ran.err


def test_rules_shows_a_file_as_it_stands(graphpatch):
    from graphpatch.lang.library import LIBRARY

    assert graphpatch("rules", "lora").out == (LIBRARY / "lora.rules").read_text(encoding="utf-8")
    listed = graphpatch("rules").out
    assert "rank: int = 16" in listed


# ── all commands ──


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help(graphpatch, command):
    ran = graphpatch(command, "--help")
    assert ran.code == 0 and ran.out.startswith(f"usage: graphpatch {command}")


def test_without_a_command_there_is_help(graphpatch):
    ran = graphpatch()
    assert ran.code == 0 and all(command in ran.out for command in cli.COMMANDS)


def test_version(graphpatch):
    out = graphpatch("--version").out
    assert out.startswith("graphpatch 0.1.0") and f"torch {torch.__version__}" in out


def test_a_command_that_is_not_there(graphpatch):
    ran = graphpatch("plam", "lora")
    assert ran.code == 2 and "did you mean `plan`?" in ran.err


def test_an_internal_error_asks_for_a_report_and_shows_no_traceback(graphpatch, monkeypatch):
    import graphpatch.cli.rules as command

    def fail(options):
        raise KeyError("oops\nand more")

    monkeypatch.setattr(command, "run", fail)
    ran = graphpatch("rules")
    assert ran.code == 2 and "please report it: KeyError" in ran.err and "Traceback" not in ran.err
    monkeypatch.setenv("GRAPHPATCH_DEBUG", "1")
    with pytest.raises(KeyError):
        cli.main(["rules"])


def test_ctrl_c_is_quiet(graphpatch, monkeypatch):
    import graphpatch.cli.rules as command

    def interrupt(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "run", interrupt)
    assert graphpatch("rules") == (130, "", "")


def test_a_reader_that_went_away_is_no_error(monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        assert cli.main(["rules", "roles"]) == 141
    assert capsys.readouterr().err == ""


def test_progress_shows_on_a_terminal_and_nowhere_else(graphpatch, llama, monkeypatch):
    from graphpatch.cli.terminal import progress

    assert graphpatch("match", "q_proj", "--model", llama).err == ""

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    with progress("building it"):
        assert screen.getvalue().endswith("building it ...")
    assert screen.getvalue().endswith("\r\x1b[K")


def test_explain_and_ops_as_json(graphpatch, llama_tree):
    ran = graphpatch("explain", "model.layers.0.self_attn.q_proj", "lora", "--model", llama_tree, "--json")
    body = json.loads(ran.out)
    assert body["format"] == 1 and body["path"] == "model.layers.0.self_attn.q_proj"
    assert [rule["touches"] for rule in body["rules"]] == [True, True]
    every = json.loads(graphpatch("ops", "--json").out)["ops"]
    (one,) = json.loads(graphpatch("ops", "lora", "--json").out)["ops"]
    assert one in every and one["arguments"][0]["name"] == "rank"


def test_an_index_that_is_not_there_is_answered_with_those_that_are(graphpatch, llama_tree):
    ran = graphpatch("explain", "model.layers.99", "lora", "--model", llama_tree)
    assert ran.code == 1 and "it has [0:4]" in ran.err and "did you mean" not in ran.err


def test_a_selector_of_the_command_line_sees_no_params(graphpatch, llama_tree):
    ran = graphpatch("match", "layers[$n]", "--model", llama_tree)
    assert ran.code == 2 and "sees no params" in ran.err
    assert "there are attention_linears, " in graphpatch("match", "@nope", "--model", llama_tree).err


def test_an_empty_setting_is_called_empty(graphpatch, llama_tree):
    ran = graphpatch("plan", "lora", "--model", llama_tree, "--set", "rank=")
    assert ran.code == 1 and "nothing is given" in ran.err
