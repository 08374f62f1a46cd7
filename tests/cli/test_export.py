"""`graphpatch export`: from a saved adapter to what a server reads, without a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import graphpatch as gp
from tests.checkpoint import readers_common as common


def adapter(folder: Path, text: str = "patch {q,v}_proj with lora(rank=32)") -> Path:
    patch = gp.apply(common.llama(), gp.parse(f"{text}\nfreeze ** except @new"))
    gp.save_adapter(patch, folder)
    return folder


@pytest.mark.parametrize("reader", ["vllm", "sglang", "llamacpp", "trtllm", "mlx"])
def test_it_needs_no_model(graphpatch, tmp_path, reader):
    ran = graphpatch("export", adapter(tmp_path / "ours"), tmp_path / "out", "--for", reader)
    assert ran.code == 0, ran.err
    assert ran.out == f"6 modules written to {tmp_path / 'out'}, as {reader} reads them\n"  # k beside q and v
    assert ("--max-lora-rank 32" in ran.err) == (reader == "vllm")
    assert (tmp_path / "out" / "adapter_config.json").exists()


def test_diffusers_needs_the_part(graphpatch, tmp_path):
    folder = adapter(tmp_path / "ours")
    assert graphpatch("export", folder, tmp_path / "out", "--for", "diffusers").code == 2
    assert graphpatch("export", folder, tmp_path / "out", "--for", "diffusers", "--part", "text_encoder").code == 0


def test_what_is_exported_is_valid(graphpatch, tmp_path):
    common.llama().save_pretrained(tmp_path / "base")
    folder = adapter(tmp_path / "ours", "patch {q,v}_proj with lora(rank=4, alpha=3, use_rslora=true)")
    ran = graphpatch("export", folder, tmp_path / "out", "--for", "sglang", "--base", tmp_path / "base")
    assert ran.code == 0
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        tmp_path / "base"
    )
    assert graphpatch("validate", tmp_path / "out", "--for", "vllm,sglang,trtllm,llamacpp").code == 0
    ran = graphpatch("export", tmp_path / "out", tmp_path / "again", "--for", "vllm", "--model", tmp_path / "base")
    assert ran.code == 0
    one, two = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("out", "again"))
    assert one == two


def test_what_a_reader_would_not_read_exits_with_1_and_is_not_written(graphpatch, tmp_path):
    folder = adapter(tmp_path / "ours", "patch {q,v}_proj with lora(rank=4, alpha=3, use_rslora=true)")
    ran = graphpatch("export", folder, tmp_path / "out", "--for", "sglang", "--profile", "peft")
    assert ran.code == 1 and "GP637" in ran.err and "sglang#40835" in ran.err and not (tmp_path / "out").exists()


def test_a_folder_with_a_model_is_left_alone(graphpatch, tmp_path):
    common.llama().save_pretrained(tmp_path / "base")
    before = sorted(file.name for file in (tmp_path / "base").iterdir())
    ran = graphpatch("export", adapter(tmp_path / "ours"), tmp_path / "base", "--for", "vllm")
    assert ran.code == 2 and "GP636" in ran.err
    assert sorted(file.name for file in (tmp_path / "base").iterdir()) == before


@pytest.mark.parametrize("arguments", [["--for", "vlm"], [], ["--for", "vllm", "--part", "unet"]])
def test_what_cannot_be_tried_exits_with_2(graphpatch, tmp_path, arguments):
    ran = graphpatch("export", adapter(tmp_path / "ours"), tmp_path / "out", *arguments)
    assert ran.code == 2 and "Traceback" not in ran.err
