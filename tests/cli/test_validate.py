"""`graphpatch validate` on adapters of PEFT's making and others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import graphpatch as gp
from graphpatch import Tree
from tests.checkpoint import readers_common as common


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    return common.peft_adapter(tmp_path_factory.mktemp("adapter") / "plain", common.llama())


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("base") / "llama.tree"
    Tree.of(common.llama()).write(str(path))
    return path


def test_a_clean_adapter_exits_with_0(graphpatch, adapter, base):
    ran = graphpatch("validate", adapter, "--model", base)
    assert ran.code == 0
    assert ran.out.splitlines()[0] == "4 of 4 modules have an effect on this model"
    assert ran.out.count("accepted") == 5


def test_findings_exit_with_1_and_say_why_and_what_to_do(graphpatch, adapter, base, tmp_path):
    folder = common.edit_config(Path(shutil.copytree(adapter, tmp_path / "a")), use_rslora=True)
    ran = graphpatch("validate", folder, "--model", base, "--for", "vllm,sglang")
    assert ran.code == 1
    assert "vllm    accepted" in ran.out and "sglang  misread" in ran.out
    assert "sglang#40835" in ran.out and "meant times 4, and taken times 2" in ran.out


def test_json(graphpatch, adapter, base):
    ran = graphpatch("validate", adapter, "--model", base, "--for", "mlx,vllm", "--json")
    body = json.loads(ran.out)
    assert ran.code == 1 and body["effective"] == body["modules"] == 4
    assert body["readers"]["vllm"] == {"verdict": "accepted", "findings": []}
    (finding,) = body["readers"]["mlx"]["findings"]
    assert finding["effect"] == "refused" and finding["source"].startswith("mlx_lm")


def test_the_base_is_that_which_the_adapter_names_where_it_is_here(graphpatch, adapter, tmp_path):
    folder = Path(shutil.copytree(adapter, tmp_path / "a"))
    ran = graphpatch("validate", folder)
    assert ran.code == 2 and "--model M" in ran.err
    common.llama().save_pretrained(tmp_path / "base")
    common.edit_config(folder, base_model_name_or_path=str(tmp_path / "base"))
    assert graphpatch("validate", folder).code == 0
    common.edit_config(folder, base_model_name_or_path="os:getcwd")
    assert graphpatch("validate", folder).code == 2


def test_our_own_format(graphpatch, tmp_path, base):
    patch = gp.apply(common.llama(), gp.parse("patch q_proj with lora(rank=4)\nfreeze ** except @new"))
    gp.save_adapter(patch, tmp_path)
    ran = graphpatch("validate", tmp_path, "--model", base)
    assert ran.code == 1 and "export it first" in ran.err


@pytest.mark.parametrize("arguments", [["--for", "vlm"], ["--for", ","], ["--max-rank", "0"], ["--model", "nowhere"]])
def test_what_cannot_be_tried_exits_with_2(graphpatch, adapter, base, arguments):
    ran = graphpatch("validate", adapter, "--model", base, *arguments)
    assert ran.code == 2 and ran.err


def test_a_damaged_adapter_exits_with_2(graphpatch, adapter, base, tmp_path):
    folder = Path(shutil.copytree(adapter, tmp_path / "a"))
    (folder / "adapter_model.safetensors").write_bytes(b"x" * 20)
    ran = graphpatch("validate", folder, "--model", base)
    assert ran.code == 2 and "error GP631" in ran.err and "Traceback" not in ran.err
