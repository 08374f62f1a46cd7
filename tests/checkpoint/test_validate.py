"""What readers make of adapters: every row of the table has a case that goes against it, and PEFT's plain one none."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import graphpatch
from graphpatch import Error, Tree
from graphpatch.checkpoint.readers.adapter import Adapter
from graphpatch.checkpoint.readers.case import Case
from graphpatch.checkpoint.readers.table import READERS, TABLE
from graphpatch.checkpoint.readers.validate import validate_adapter as validate
from graphpatch.tree.headers import read_headers
from tests.checkpoint import readers_common as common
from tests.checkpoint.readers_common import edit_config, edit_tensors

PEFT_READERS = ("vllm", "sglang", "trtllm", "llamacpp", "ollama", "tgi", "peft")


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return common.peft_adapter(tmp_path_factory.mktemp("peft") / "plain", common.llama())


@pytest.fixture(scope="module")
def moe(tmp_path_factory) -> Path:
    stacks = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    return common.peft_adapter(tmp_path_factory.mktemp("peft") / "moe", common.mixtral(), target_parameters=stacks)


@pytest.fixture(scope="module")
def tree() -> Tree:
    return Tree.of(common.llama())


@pytest.fixture(scope="module")
def mixtral_tree() -> Tree:
    return Tree.of(common.mixtral())


@pytest.fixture
def copy(plain, tmp_path) -> Path:
    return Path(shutil.copytree(plain, tmp_path / "adapter"))


def against(folder: Path, tree: Tree | None, reader: str, **options) -> dict[str, str]:
    """The rows of a reader that find something, and what."""
    report = validate(folder, tree, reader, **options)
    return {finding.row.name: " ".join(finding.witnesses) for finding in report.findings}


def test_a_plain_adapter_of_peft_is_accepted_by_all_that_read_its_directories(plain, tree):
    report = validate(plain, tree, PEFT_READERS)
    assert report.clean and report.effective == 4
    assert {report.verdict(reader) for reader in PEFT_READERS} == {"accepted"}
    assert {validate(plain, tree, reader).verdict(reader) for reader in ("mlx", "diffusers")} == {"refused"}


@pytest.mark.parametrize(
    ("reader", "row", "change"),
    [
        ("vllm", "settings", {"r": None}),
        ("vllm", "settings", {"r": -4}),
        ("vllm", "settings", {"lora_alpha": "16"}),
        ("sglang", "settings", {"target_modules": 3}),
        ("trtllm", "settings", {"lora_alpha": float("nan")}),
        ("llamacpp", "settings", {"lora_alpha": None}),
        ("peft", "settings", {"r": True}),
        ("peft", "targets", {"target_modules": ["q_proj", "o_proj"]}),
        ("peft", "targets", {"target_modules": ".*q_proj"}),
        ("peft", "targets", {"layers_to_transform": [1]}),
        ("peft", "rank", {"r": 8}),
        ("peft", "rank", {"rank_pattern": {"0.self_attn.q_proj": 2}}),
        ("unsloth", "base", {"base_model_name_or_path": None}),
        ("vllm", "dora", {"use_dora": True}),
        ("sglang", "dora", {"use_dora": True}),
        ("vllm", "bias", {"bias": "all"}),
        ("vllm", "bias", {"lora_bias": True}),
        ("vllm", "variants", {"alora_invocation_tokens": [1]}),
        ("vllm", "init", {"init_lora_weights": "pissa"}),
        ("vllm", "modules_to_save", {"modules_to_save": ["lm_head"]}),
        ("vllm", "tokens", {"trainable_token_indices": [3]}),
        ("vllm", "rank", {"r": 32}),
        ("sglang", "kind", {"peft_type": "IA3"}),
        ("sglang", "targets", {"target_modules": ".*q_proj"}),
        ("sglang", "target names", {"target_modules": ["q_proj", "w1"]}),
        ("sglang", "scale", {"use_rslora": True}),
        ("sglang", "scale", {"alpha_pattern": {"v_proj": 3}}),
        ("sglang", "one rank", {"r": 8}),
        ("trtllm", "scale", {"alpha_pattern": {"v_proj": 3}}),
        ("llamacpp", "scale", {"use_rslora": True}),
        ("ollama", "scale", {"use_rslora": True}),
    ],
)
def test_what_the_config_may_not_say(copy, tree, reader, row, change):
    assert row in against(edit_config(copy, **change), tree, reader)


@pytest.mark.parametrize(
    ("reader", "change"),
    [
        ("vllm", {"use_rslora": True}),
        ("vllm", {"alpha_pattern": {"v_proj": 3}}),
        ("vllm", {"target_modules": ".*q_proj"}),
        ("vllm", {"modules_to_save": ["score"]}),
        ("vllm", {"init_lora_weights": "gaussian"}),
        ("trtllm", {"use_rslora": True}),
        ("sglang", {"target_modules": "all-linear"}),
    ],
)
def test_what_a_reader_honours_is_no_finding(copy, tree, reader, change):
    assert against(edit_config(copy, **change), tree, reader) == {}


def test_scales_are_worked_out_as_peft_does(copy, tree):
    edit_config(copy, use_rslora=True, alpha_pattern={r"layers\.0\.self_attn\.v_proj": 3})
    adapter = Adapter.read(copy)
    assert adapter.scale("model.layers.0.self_attn.v_proj") == 3 / 2
    assert adapter.scale("model.layers.1.self_attn.v_proj") == 8 / 2


def renamed(old: str, new: str):
    return lambda tensors: {key.replace(old, new): value for key, value in tensors.items()}


def dropped(part: str):
    return lambda tensors: {key: value for key, value in tensors.items() if part not in key}


def added(key: str, *shape: int):
    return lambda tensors: {**tensors, key: torch.zeros(shape)}


B = "base_model.model."


@pytest.mark.parametrize(
    ("reader", "row", "change"),
    [
        ("peft", "prefix", renamed(B, "")),
        ("tgi", "prefix", renamed(B, "")),
        ("peft", "path", renamed("model.layers", "layers")),
        ("vllm", "path", renamed("model.layers", "transformer.h")),
        ("vllm", "name", renamed("q_proj", "qkv")),
        ("sglang", "layers", renamed("model.layers", "transformer.h")),
        ("sglang", "path", renamed("model.layers", "vision.layers")),
        ("trtllm", "path", renamed("model.layers", "vision.layers")),
        ("llamacpp", "path", renamed("model.layers", "transformer.h")),
        ("tgi", "path", renamed("model.layers", "transformer.h")),
        *((reader, "shape", lambda t: {k: v[:, :-1] if "lora_A" in k else v for k, v in t.items()})
          for reader in ("peft", "vllm", "sglang", "trtllm", "llamacpp")),
        *((reader, "factors", dropped("0.self_attn.q_proj.lora_A"))
          for reader in ("peft", "vllm", "sglang", "trtllm", "llamacpp")),
        ("sglang", "v beside q", dropped("0.self_attn.v_proj")),
        ("sglang", "q beside v", dropped("0.self_attn.q_proj")),
        ("sglang", "q beside k", lambda t: renamed("v_proj", "k_proj")(dropped("q_proj")(t))),
        ("sglang", "q_a beside kv_a", renamed("q_proj", "kv_a_proj_with_mqa")),
        ("sglang", "kv_a beside q_a", renamed("q_proj", "q_a_proj")),
        ("sglang", "gate beside up", lambda t: {
            **t, B + "model.layers.0.mlp.up_proj.lora_A.weight": torch.zeros(4, 32),
            B + "model.layers.0.mlp.up_proj.lora_B.weight": torch.zeros(48, 4)}),
        ("sglang", "embeddings", added(B + "lm_head.lora_A.weight", 4, 32)),
        ("trtllm", "embeddings", added(B + "lm_head.lora_A.weight", 4, 32)),
        ("sglang", "key", added(B + "lm_head.weight", 64, 32)),
        ("vllm", "key", added(B + "model.norm.weight", 32)),
        ("vllm", "tokens", added(B + "model.embed_tokens.token_adapter.trainable_tokens_delta", 1, 32)),
        ("vllm", "bias", added(B + "model.layers.0.self_attn.q_proj.lora_B.bias", 32)),
        ("trtllm", "key", added(B + "model.layers.0.self_attn.q_proj.lora_B.bias", 32)),
        ("trtllm", "modules", renamed("q_proj", "c_attn")),
        ("trtllm", "stacks of layers", lambda t: {
            **t, **{k.replace("model.layers", "vision.layers"): v.clone() for k, v in t.items()}}),
        ("trtllm", "dora experts", added(B + "model.layers.0.mlp.experts.1.w1.lora_magnitude_vector", 4)),
        ("llamacpp", "key", added(B + "lm_head.weight", 64, 32)),
        ("ollama", "orientation", lambda t: {k: v.repeat(*((20, 1) if "lora_A" in k else (1, 20))) for k, v in t.items()}),
    ],
)  # fmt: skip
def test_what_the_tensors_may_not_be(copy, tree, reader, row, change):
    assert row in against(edit_tensors(copy, change), tree, reader)


def test_norms_pass_where_they_are_known(copy, tree):
    edit_tensors(copy, added(B + "model.norm.weight", 32))
    assert against(copy, tree, "llamacpp") == {}


def test_the_head_of_a_tied_model(copy):
    tied = Tree.of(common.llama(tie_word_embeddings=True))
    edit_tensors(copy, lambda t: {**t, B + "lm_head.lora_A.weight": torch.zeros(4, 32), B + "lm_head.lora_B.weight": torch.zeros(64, 4)})  # fmt: skip
    assert "head" in against(copy, tied, "llamacpp")


def test_tokens_past_the_vocabulary(copy, tree):
    (copy / "added_tokens.json").write_text(json.dumps({"<old>": 3}))
    assert against(copy, tree, "sglang") == {}
    (copy / "added_tokens.json").write_text(json.dumps({"<new>": 64}))
    assert "<new> is 64" in against(copy, tree, "sglang")["vocabulary"]


def test_a_server_that_was_started_with_a_higher_rank(copy, tree):
    edit_config(copy, r=32)
    assert "rank" in against(copy, tree, "vllm")
    assert against(copy, tree, "vllm", max_rank=32) == {}
    assert "rank" in against(copy, tree, "sglang", max_rank=8)


def test_an_adapter_beside_a_model(copy, tree):
    (copy / "config.json").write_text("{}")
    assert "folder" in against(copy, tree, "peft") and "folder" in against(copy, tree, "unsloth")


def test_ollama_converts_two_families(moe, mixtral_tree):
    assert "mixtral" in against(moe, mixtral_tree, "ollama")["model"]


# ── experts ──


def test_stacks_of_experts_are_for_peft_alone(moe, mixtral_tree):
    report = validate(moe, mixtral_tree, PEFT_READERS)
    assert report.effective == 8 and report.verdict("peft") == "accepted"
    assert all("experts" in against(moe, mixtral_tree, reader) for reader in ("vllm", "sglang", "llamacpp"))


def one_by_one(names: str, block: str, experts: int = 4):
    def change(tensors):
        made = {key: value for key, value in tensors.items() if "experts" not in key}
        sizes = {"gate_proj": (48, 32), "up_proj": (48, 32), "down_proj": (32, 48), "w1": (48, 32), "w3": (48, 32), "w2": (32, 48)}  # fmt: skip
        for layer in range(2):
            for number in range(experts):
                for name in names.split():
                    out, in_ = sizes[name]
                    path = f"{B}model.layers.{layer}.{block}.experts.{number}.{name}"
                    made[f"{path}.lora_A.weight"] = torch.zeros(4, in_)
                    made[f"{path}.lora_B.weight"] = torch.zeros(out, 4)
        return made

    return change


def test_single_experts_have_the_names_of_the_files(moe, mixtral_tree, tmp_path):
    folder = Path(shutil.copytree(moe, tmp_path / "moe"))
    edit_tensors(folder, one_by_one("w1 w3 w2", "block_sparse_moe"))
    edit_config(folder, target_modules=["q_proj", "v_proj"])
    report = validate(folder, mixtral_tree, ("vllm", "sglang", "trtllm", "llamacpp"))
    assert report.clean and report.effective == 4 + 2 * 4 * 3

    edit_tensors(folder, renamed("block_sparse_moe", "moe"))
    assert "experts.0.w1" in against(folder, mixtral_tree, "vllm")["path"]  # of which vLLM sees the tail alone

    edit_tensors(folder, one_by_one("gate_proj up_proj down_proj", "mlp"))
    assert validate(folder, mixtral_tree, "vllm").effective == 28
    assert "block_sparse_moe.experts.0.w1 there" in against(folder, mixtral_tree, "vllm")["expert names"]
    assert "expert names" in against(folder, mixtral_tree, "llamacpp")
    assert "expert names" in against(folder, mixtral_tree, "trtllm")


def test_experts_that_are_missing_or_too_many(moe, mixtral_tree, tmp_path):
    folder = Path(shutil.copytree(moe, tmp_path / "moe"))
    edit_tensors(folder, one_by_one("w1 w3 w2", "block_sparse_moe"))
    edit_tensors(folder, dropped("0.block_sparse_moe.experts.2.w1"))
    assert "3 w1 of 4" in against(folder, mixtral_tree, "llamacpp")["all experts"]
    edit_tensors(folder, one_by_one("w1 w3 w2", "block_sparse_moe", experts=5))
    assert validate(folder, mixtral_tree, "vllm").effective == 28


def test_models_that_vllm_keeps_in_stacks(moe, mixtral_tree, tmp_path):
    from dataclasses import replace

    stacked = replace(mixtral_tree, configs=[{**mixtral_tree.configs[0], "model_type": "gpt_oss"}])
    assert against(moe, stacked, "vllm") == {}
    folder = Path(shutil.copytree(moe, tmp_path / "moe"))
    edit_tensors(folder, dropped("experts.base_layer"))
    assert "pair" in against(folder, stacked, "vllm")
    edit_tensors(folder, one_by_one("gate_proj up_proj down_proj", "mlp"))
    assert "stacks" in against(folder, stacked, "vllm")


# ── effective modules ──


def test_loaded_and_does_nothing_is_told(copy, tree):
    edit_tensors(copy, renamed("model.layers", "model.language_model.layers"))
    report = validate(copy, tree, "tgi")
    assert report.effective == 0 and not report.clean
    assert report.dead.code == "GP634" and "0 of 4" in report.dead.title
    assert "did you mean" in str(report.dead.text)


def test_an_adapter_of_another_size_has_no_effect(plain):
    other = Tree.of(common.llama(head_dim=16))
    report = validate(plain, other, "vllm")
    assert report.effective == 0 and "the model wants [4, 32] and [64, 4]" in str(report.dead.text)


def test_a_tree_of_weights_alone_will_do(plain, tmp_path):
    common.llama().save_pretrained(tmp_path)
    report = validate(plain, read_headers(str(tmp_path)), PEFT_READERS)
    assert report.effective == 4 and report.clean


def test_conv1d_and_embeddings_and_convolutions(tmp_path):
    gpt2 = common.gpt2()
    folder = common.peft_adapter(tmp_path / "gpt2", gpt2, target_modules=["c_attn", "c_proj", "wte"])
    assert validate(folder, Tree.of(common.gpt2()), "peft").effective == 7

    folder = common.peft_adapter(tmp_path / "conv", _conv(), target_modules=["0", "1", "2"])
    assert validate(folder, Tree.of(_conv()), "peft").effective == 3


def _conv() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Conv2d(4, 6, 3), torch.nn.Conv1d(6, 6, 2), torch.nn.Embedding(5, 8))


# ── files ──


def test_our_own_format_is_exported_first(tmp_path):
    model = common.llama()
    patch = graphpatch.apply(model, graphpatch.parse("patch q_proj with lora(rank=4)\nfreeze ** except @new"))
    graphpatch.save_adapter(patch, tmp_path)
    with pytest.raises(Error) as caught:
        validate(tmp_path, model, "sglang")
    assert caught.value.code == "GP638" and f"graphpatch export {tmp_path} OUT --for sglang" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("adapter_model.safetensors", b"", "is not a safetensors file"),
        ("adapter_model.safetensors", b"\xff" * 64, "is not a safetensors file"),
        ("adapter_model.safetensors", None, "bytes are missing"),
        ("adapter_config.json", b"{", "not JSON"),
        ("adapter_config.json", b"[1]", "a table of settings"),
        ("adapter_config.json", b"[" * 100_000, "not JSON"),
        ("adapter_config.json", b"\xff\xfe\x00", "not JSON"),
    ],
)
def test_damaged_files_are_told(copy, tree, name, content, says):
    path = copy / name
    path.write_bytes(path.read_bytes()[:-10] if content is None else content)
    with pytest.raises(Error) as caught:
        validate(copy, tree, "vllm")
    assert caught.value.code == "GP631" and says in str(caught.value)


def test_a_pickle_is_not_opened(copy, tree):
    (copy / "adapter_model.safetensors").rename(copy / "adapter_model.bin")
    with pytest.raises(Error, match="could run any code"):
        validate(copy, tree, "vllm")


@pytest.mark.parametrize("folder", ["nowhere", "."])
def test_no_adapter_there(tmp_path, tree, folder):
    with pytest.raises(Error) as caught:
        validate(tmp_path / folder, tree, "vllm")
    assert caught.value.code == "GP631"


def test_an_adapter_with_a_name_is_found_in_its_folder(plain, tmp_path, tree):
    shutil.copytree(plain, tmp_path / "math")
    with pytest.raises(Error, match=r"there is one in .*math"):
        validate(tmp_path, tree, "vllm")


def test_a_config_of_wrong_types_is_findings_and_no_crash(copy, tree):
    wrong = [None, True, -1, 0, 1e300, "x", [], [1], {}, {"a": "b"}, [["q_proj"]], "(a+)+$", {"(a+)+$": 4, "[": 2}]
    names = json.loads((copy / "adapter_config.json").read_text())
    for name in names:
        for value in wrong:
            edit_config(copy, **{**names, name: value})
            validate(copy, tree, READERS)


def test_a_regex_that_backtracks_is_never_run(copy, tree):
    edit_config(copy, alpha_pattern={"(([a-z_.0-9]+)+)+x": 4})
    assert validate(copy, tree, "vllm").clean


def test_an_unknown_reader_is_told(plain, tree):
    with pytest.raises(Error) as caught:
        validate(plain, tree, "vllm,sgland")
    assert caught.value.code == "GP632" and "did you mean `sglang`?" in str(caught.value)


def test_torch_is_not_imported(plain):
    program = f"""
import sys, graphpatch
graphpatch.validate_adapter({str(plain)!r}, None, "vllm,sglang")
assert "torch" not in sys.modules
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert run.returncode == 0, run.stderr


# ── the table ──


def test_every_row_says_what_why_and_where_from():
    assert len(TABLE) > 70 and {"vllm", "sglang", "llamacpp", "trtllm", "mlx", "diffusers", "peft"} <= set(READERS)
    for row in TABLE:
        assert row.says and row.fix and row.source and row.effect in ("refused", "misread"), row
    assert len({(row.reader, row.name) for row in TABLE}) == len(TABLE)
    for reader in READERS:
        assert next(row.name for row in TABLE if row.reader == reader) == "layout"


def test_rows_need_no_model(plain):
    case = Case(Adapter.read(plain))
    assert [row.name for row in TABLE if row.reader in PEFT_READERS and list(row.check(case))] == []
