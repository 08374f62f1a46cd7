"""Whatever stands in an adapter's files, validating it ends in a report or in an `Error`, and so does exporting it."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path

import pytest

from graphpatch import Error, Tree, export_adapter, validate_adapter
from graphpatch.checkpoint.readers.table import READERS
from tests.checkpoint import readers_common as common

SEGMENTS = ["", "x" * 300, "é\u0000"]
SEGMENTS += (
    "model layers 0 1 7 mlp self_attn q_proj k_proj v_proj experts switch_mlp base_layer w1 gate_proj up_proj down_proj "
    "lm_head embed_tokens norm base_model vision block_sparse_moe shared_experts default 99999999999999999999 unet"
).split()
TAILS = [""]
TAILS += (
    "lora_A.weight lora_B.weight lora_A.weight lora_B.weight lora_embedding_A lora_embedding_B lora_a lora_b weight bias "
    "lora_magnitude_vector lora_A.default.weight lora_B.bias lora_A m alpha dora_scale trainable_tokens_delta"
).split()
PREFIXES = ["", "model.layers.1.self_attn.", *(f"base_model.model.{p}" for p in ("", "model.layers.0.", "model.layers.0.mlp.experts."))]  # fmt: skip
VALUES = [None, True, False, 0, 1, -1, 4, 16, 1e300, "x", "all-linear", ".*q_proj", "(a+)+$", [], ["q_proj"], [1, None, ["a"]],
          {}, {"q_proj": 4}, {"(": 3}, {"": 1}, {".*": "x"}, {"a.b": None}, ["q_proj"] * 50, [""]]  # fmt: skip
NAMES = (
    "r lora_alpha target_modules rank_pattern alpha_pattern use_rslora use_dora bias modules_to_save peft_type "
    "init_lora_weights target_parameters exclude_modules layers_to_transform layers_pattern trainable_token_indices "
    "lora_parameters num_layers base_model_name_or_path"
).split()


@pytest.fixture(scope="module")
def tree() -> Tree:
    return Tree.of(common.mixtral())


def write(folder: Path, rng: random.Random) -> None:
    header: dict[str, object] = {}
    for _ in range(rng.randrange(1, 25)):
        parts = [rng.choice(SEGMENTS) for _ in range(rng.randrange(5))]
        shape = [rng.choice([0, 1, 4, 16, 32, 48, 64, 10**15]) for _ in range(rng.choice([0, 1, 2, 2, 2, 2, 3, 4]))]
        entry = {"dtype": rng.choice(["F32", "BF16", "Z9"]), "shape": shape, "data_offsets": [0, 0]}
        header[rng.choice(PREFIXES) + ".".join([*parts, rng.choice(TAILS)])] = entry
    said = ["[1]", "{", '{"unet.r": 3, "x": null}']
    header["__metadata__"] = rng.choice([5, {}, *({"lora_adapter_metadata": text} for text in said)])
    text = json.dumps(header).encode()
    name = rng.choice(["adapter_model.safetensors"] * 3 + ["adapters.safetensors", "pytorch_lora_weights.safetensors"])
    (folder / name).write_bytes(struct.pack("<Q", len(text)) + text)
    config = {name: rng.choice(VALUES) for name in NAMES if rng.random() < 0.5}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "added_tokens.json").write_text(rng.choice(["[]", "{", '{"a": "x", "b": 1000}', '{"a": 1e5}']))


@pytest.mark.parametrize("seed", range(80))
def test_anything_ends_in_a_report_or_an_error(tmp_path, tree, seed):
    rng = random.Random(seed)
    (tmp_path / "adapter").mkdir()
    write(tmp_path / "adapter", rng)
    report = validate_adapter(tmp_path / "adapter", rng.choice([tree, tree, None]), READERS)
    assert json.loads(json.dumps(report.to_json()))["readers"].keys() == set(READERS)
    assert all(diagnostic.render() for diagnostic in report.diagnostics)
    with pytest.raises(Error):  # its tensors have no bytes
        export_adapter(tmp_path / "adapter", tmp_path / "out", rng.choice(READERS), model=tree)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("seed", range(40))
def test_damaged_bytes_end_in_a_report_or_an_error(tmp_path, tree, seed):
    rng = random.Random(seed)
    write(tmp_path, rng)
    for file in list(tmp_path.iterdir()):
        text = bytearray(file.read_bytes())
        for _ in range(rng.choice([1, 1, 5])):
            at = rng.randrange(len(text) + 1)
            text[at : at + rng.randrange(3)] = rng.choice(
                [b'"', b"[", b",", b"null", b"9" * 40, b"\xff", b"1e999", b""]
            )
        file.write_bytes(text)
    try:
        assert validate_adapter(tmp_path, tree, READERS).to_json()
    except Error as error:
        assert error.code == "GP631"
