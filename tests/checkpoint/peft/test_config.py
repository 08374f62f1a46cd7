"""Configs that cannot be followed, folders that hold none, and what the rules of one look like."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from peft import LoraConfig

import graphpatch
from graphpatch.cli.main import main
from tests.checkpoint.peft.models import llama, logits, theirs

PLAIN = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]}


def refused(code: str, source: object) -> str:
    with pytest.raises(graphpatch.Error) as caught:
        graphpatch.from_peft(source)  # type: ignore[arg-type]
    assert caught.value.code == code, str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layer_replication", [[0, 2]]),
        ("trainable_token_indices", [1, 2]),
        ("alora_invocation_tokens", [5]),
        ("use_qalora", True),
        ("velora_config", {"num_groups": 2}),
        ("monteclora_config", {"num_samples": 2}),
        ("kasa_config", {"x": 1}),
        ("use_bdlora", {"nblocks": 2}),
        ("arrow_config", {"top_k": 1}),
        ("megatron_config", {"tensor_model_parallel_size": 2}),
        ("peft_type", "LOHA"),
        ("something_new", True),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", False),
        ("r", 0),
        ("r", "8"),
        ("r", True),
        ("lora_alpha", float("nan")),
        ("lora_dropout", 1.0),
        ("target_modules", {"q_proj": 1}),
        ("target_modules", [1]),
        ("target_modules", []),
        ("rank_pattern", {"q_proj": "8"}),
        ("bias", "some"),
        ("layers_pattern", "layers"),
        ("modules_to_save", "lm_head"),
    ],
)
def test_a_field_that_cannot_be_followed_is_named(field, value):
    assert f"`{field}`" in refused("GP622", {**PLAIN, field: value}).partition("\n")[0]


def test_fields_at_their_defaults_are_passed_over():
    fields = LoraConfig(target_modules=["q_proj"]).to_dict()
    assert len(fields) > 35
    rules = graphpatch.from_peft({**fields, "something_new": None, "something_else": []})
    assert rules == graphpatch.from_peft({"peft_type": "LORA", "target_modules": ["q_proj"]})
    assert graphpatch.from_peft({"peft_type": "LORA", "target_modules": "all-linear", "fan_in_fan_out": True})


@pytest.mark.parametrize("pattern", ["(a+)+$", r".*.*.*.*q", "(", r"(\w+)\1"])
def test_a_regex_that_could_run_without_end_is_not_run(pattern):
    assert pattern in refused("GP627", {**PLAIN, "target_modules": pattern})
    assert pattern in refused("GP627", {**PLAIN, "exclude_modules": pattern})
    assert pattern in refused("GP627", {**PLAIN, "rank_pattern": {pattern: 2}})


def test_weights_name_the_modules_where_the_config_does_not(tmp_path):
    """The regex that Unsloth writes has four unbounded repeats, which the language refuses."""
    regex = (
        r"(?:.*?(?:language|text|model).*?(?:self_attn|attention|attn|mlp).*?(?:q_proj|v_proj|up_proj).*?)"
        r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:q_proj|v_proj|up_proj))"
    )
    model = llama()
    expected = theirs(model, tmp_path, target_modules=regex, r=4, rank_pattern={"layers.2.*": 2}, bias="lora_only")
    rules = graphpatch.from_peft(tmp_path)
    assert "/" not in rules.program.source(0).text.partition("train")[0].partition("\n")[2]
    assert sorted(change.path.rpartition(".")[2] for change in rules.plan(model).changes) == sorted(
        ["q_proj", "v_proj", "up_proj"] * 3
    )
    graphpatch.load_peft(model, tmp_path)
    assert (logits(model) - expected).abs().max() < 1e-5
    (tmp_path / "adapter_model.safetensors").unlink()
    refused("GP627", tmp_path)


def test_folders_without_an_adapter(tmp_path):
    refused("GP621", tmp_path / "nowhere")
    (tmp_path / "named").mkdir()
    (tmp_path / "named" / "adapter_config.json").write_text(json.dumps(PLAIN))
    assert str(tmp_path / "named") in refused("GP621", tmp_path)
    assert "folder" in refused("GP621", tmp_path / "named" / "adapter_config.json")
    for text in ("", "{", "[]", "3", '{"r": ', "\x00", "[" * 100_000):
        (tmp_path / "adapter_config.json").write_text(text)
        refused("GP621", tmp_path)


GOLDEN = """\
# LoRA as adapter says it, in PEFT's format.
alias spared = lm_head:Module
alias targets = ^model.layers.0.self_attn.q_proj:Module
alias targets2 = q_proj:Module | v_proj:Module
alias saved = /.*lm_head/
patch @targets
  with lora(rank=2, alpha=8, dropout=0.1)
  except @spared
  expect any
patch @targets2
  with lora(rank=4, alpha=8, dropout=0.1)
  except @spared | @targets
  expect any
require has(@targets) or has(@targets2)
freeze ** except @new
train @saved
"""


def test_the_command_prints_the_rules(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("adapter").mkdir()
    fields = {
        **PLAIN,
        "target_modules": ["q_proj", "v_proj"],
        "lora_dropout": 0.1,
        "rank_pattern": {r"^model\.layers\.0\.self_attn\.q_proj": 2},
        "modules_to_save": ["lm_head"],
    }
    Path("adapter/adapter_config.json").write_text(json.dumps(fields))
    assert main(["import", "adapter"]) == 0
    assert capsys.readouterr().out == GOLDEN
    assert main(["import", "adapter", "-o", "out.rules"]) == 0
    assert Path("out.rules").read_text() == GOLDEN
    assert (
        graphpatch.load("out.rules").plan(llama()).trainable == graphpatch.from_peft("adapter").plan(llama()).trainable
    )
    assert main(["import", "nowhere"]) == 2
    assert "GP621" in capsys.readouterr().err


def test_rules_need_no_torch():
    code = f"""
import sys, graphpatch
graphpatch.from_peft({PLAIN!r})
assert "torch" not in sys.modules and "peft" not in sys.modules and "safetensors" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
