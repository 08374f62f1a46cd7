"""What `--model` may name, and what is said of what it may not."""

import json
import os
import struct
import sys

import pytest
import torch
from safetensors.torch import save_file

from graphpatch import Tree
from graphpatch.cli.model import open_tree
from graphpatch.cli.problem import CannotRun
from graphpatch.tree.tree import Tensor


def refused(name) -> str:
    with pytest.raises(CannotRun) as error:
        open_tree(str(name))
    return str(error.value)


def config(folder, **entries):
    (folder / "config.json").write_text(json.dumps(entries))
    return folder


def test_a_config_gives_the_tree_of_the_model_that_transformers_builds(llama):
    from transformers import LlamaConfig, LlamaForCausalLM

    entries = json.loads((llama / "config.json").read_text())
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(LlamaConfig(**entries))
    tree = open_tree(str(llama))
    assert tree.fingerprint == Tree.of(model).fingerprint
    assert tree.signature(tree.find("lm_head")).parameters["weight"].dtype == "bfloat16"


def test_without_architectures_it_is_the_plain_model_and_that_is_said(tmp_path, capsys):
    tree = open_tree(
        str(config(tmp_path, model_type="bert", num_hidden_layers=2, hidden_size=32, num_attention_heads=2))
    )
    assert tree.title == "BertModel"
    assert "names no architecture; BertModel" in capsys.readouterr().err


def test_the_attention_kernel_and_the_quantisation_of_a_checkpoint_do_not_matter(tmp_path, llama, capsys):
    entries = json.loads((llama / "config.json").read_text())
    entries |= {"_attn_implementation": "flash_attention_2", "quantization_config": {"quant_method": "bitsandbytes"}}
    assert open_tree(str(config(tmp_path, **entries))).title == "LlamaForCausalLM"
    assert "quantised" in capsys.readouterr().err


def test_no_code_of_a_checkpoint_is_run(tmp_path):
    (tmp_path / "modeling_evil.py").write_text("raise SystemExit('ran')")
    entries = {
        "architectures": ["EvilModel"],
        "model_type": "evil",
        "auto_map": {"AutoModel": "modeling_evil.EvilModel"},
    }
    said = refused(config(tmp_path, **entries))
    assert "no model class EvilModel" in said and "runs no code that a checkpoint brings" in said


@pytest.mark.parametrize("name", ["pipeline", "AutoModelForCausalLM", "LlamaConfig", "__doc__", "LlamaForCausalML"])
def test_an_architecture_that_is_no_model_class(tmp_path, name):
    said = refused(config(tmp_path, architectures=[name], model_type="llama"))
    assert f"no model class {name}" in said
    assert "did you mean `LlamaForCausalLM`?" in said or name != "LlamaForCausalML"


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "[" * 100_000, '{"a": 1}', '{"model_type": 3}', '{"model_type": "nope"}', "\xff"]
)
def test_a_broken_config(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text, encoding="latin-1")
    assert refused(path).startswith(("error GP703", "error GP704"))


def test_a_config_that_cannot_be_built(tmp_path):
    said = refused(config(tmp_path, architectures=["LlamaForCausalLM"], hidden_size="large"))
    assert said.startswith("error GP705") and "LlamaForCausalLM" in said


# ── safetensors ──


def test_safetensors_give_names_shapes_and_dtypes_without_torch_or_classes(tmp_path):
    state = {f"layers.{i}.q.weight": torch.zeros(4, 2, dtype=torch.bfloat16) for i in range(11)}
    save_file(state | {"head.weight": torch.zeros(3, 4), "scale": torch.zeros(())}, tmp_path / "model.safetensors")
    tree = open_tree(str(tmp_path / "model.safetensors"))
    assert not tree.has_classes and tree.numel() == 11 * 8 + 12 + 1
    assert tree.signature(0).parameters["scale"].shape == ()
    node = tree.find("layers.10.q")
    assert node is not None and tree.signature(node).parameters["weight"] == Tensor((4, 2), "bfloat16")
    layers = tree.find("layers")
    # Integers in their order, and each knows how many there are.
    assert [tree.names[child] for child in tree.children(layers)] == [str(i) for i in range(11)]
    assert {tree.lengths[child] for child in tree.children(layers)} == {11}
    assert tree.ends[0] == len(tree)


def test_its_structure_is_that_of_the_model_it_was_saved_from(tmp_path, llama):
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**json.loads((llama / "config.json").read_text())))
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors")
    headers, live = open_tree(str(tmp_path)), Tree.of(model)
    with_parameters = {p for p in live.paths if live.signature(live.find(p)).parameters}
    assert {p for p in headers.paths if headers.signature(headers.find(p)).parameters} == with_parameters
    assert headers.numel() == live.numel()


def test_selectors_match_it_and_classes_are_an_error_there(graphpatch, rules, tmp_path):
    save_file({f"layers.{i}.q.weight": torch.zeros(4, 2) for i in range(3)}, tmp_path / "model.safetensors")
    ran = graphpatch("match", "layers[:-1].q", "--model", tmp_path)
    assert ran.code == 0 and "^layers[0:2].q" in ran.out
    by_class = graphpatch("match", ":Linear", "--model", tmp_path)
    assert by_class.code == 2 and "class" in by_class.err


def test_shards_are_one_model_and_the_same_key_twice_is_none(tmp_path):
    save_file({"a.weight": torch.zeros(2)}, tmp_path / "model-1.safetensors")
    save_file({"b.weight": torch.zeros(2)}, tmp_path / "model-2.safetensors")
    assert open_tree(str(tmp_path)).names == ["", "a", "b"]
    save_file({"b.weight": torch.zeros(2)}, tmp_path / "consolidated.safetensors")
    assert "holds `b.weight`, and so does a file before it" in refused(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a.weight": "model-1.safetensors", "b.weight": "model-2.safetensors"}}))
    assert len(open_tree(str(index))) == len(open_tree(str(tmp_path))) == 3


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff" * 8, struct.pack("<Q", 5) + b"{", struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 3) + b"{{{"],
)
def test_broken_safetensors(graphpatch, tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    for arguments in (["tree"], ["explain", "q", "lora"]):
        ran = graphpatch(*arguments, "--model", path)
        assert ran.code == 2 and ran.out == "" and f"{path} is not a safetensors file" in ran.err


def test_a_pointer_of_git_lfs_is_known(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:1")
    assert "git lfs pull" in refused(tmp_path)


# ── package.module:callable ──


@pytest.fixture
def mymodels(tmp_path, monkeypatch):
    (tmp_path / "mymodels.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Sequential):\n"
        "    def __init__(self): super().__init__(torch.nn.Linear(2, 3))\n"
        "ready = Net()\n"
        "number = 3\n"
        "def build(): return Net()\n"
        "def nothing(): return None\n"
        "def broken(): raise ValueError('no such width')\n"
        "def leave(): raise SystemExit(0)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "mymodels"
    sys.modules.pop("mymodels", None)


@pytest.mark.parametrize("name", ["build", "Net", "ready"])
def test_a_callable_of_the_current_directory(mymodels, name):
    tree = open_tree(f"{mymodels}:{name}")
    assert tree.title == "Net" and tree.numel() == 9


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("biuld", "did you mean `build`?"),
        ("number", "is a int"),
        ("nothing", "gave a NoneType"),
        ("broken", "ValueError: no such width"),
        ("leave", "SystemExit: 0"),
        ("Net.nope", "has no `Net.nope`"),
    ],
)
def test_a_callable_that_gives_no_model(mymodels, name, said):
    text = refused(f"{mymodels}:{name}")
    assert text.startswith("error GP707") and said in text


def test_a_module_that_is_not_there(mymodels):
    assert "current directory" in refused("nomodels:build")


# ── what is no model ──


def test_a_name_of_a_hub_is_told_that_hubs_are_not_contacted(graphpatch, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = graphpatch("tree", "--model", "meta-llama/Llama-3-8B")
    assert ran.code == 2 and ran.out == "" and "hubs are not contacted" in ran.err


def test_the_nearest_file_is_named(llama_tree):
    assert "did you mean `llama.tree`?" in refused(llama_tree.with_name("lama.tree"))


@pytest.mark.parametrize("name", ["weights.bin", "model.gguf", "my.rules", "notes.txt"])
def test_files_of_other_kinds(tmp_path, name):
    (tmp_path / name).write_text("x")
    assert refused(tmp_path / name).startswith("error GP702")


@pytest.mark.parametrize("name", ["", "/dev/null"])
def test_what_is_no_file_at_all(name):
    assert refused(name).startswith("error GP70")


def test_a_tree_and_rules_through_a_pipe(graphpatch, rules, llama_tree, tmp_path):
    from threading import Thread

    contents = {
        "pipe.tree": llama_tree.read_text(),
        "pipe.rules": "patch q_proj with lora(rank=4)\nfreeze ** except @new\n",
    }
    for name, text in contents.items():
        os.mkfifo(tmp_path / name)
        Thread(target=(tmp_path / name).write_text, args=(text,), daemon=True).start()
    ran = graphpatch("plan", tmp_path / "pipe.rules", "--model", tmp_path / "pipe.tree")
    assert ran.code == 0 and "4 modules" in ran.out


def test_directories_of_other_kinds(tmp_path):
    assert "neither a config.json nor safetensors" in refused(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "holds an adapter" in refused(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    assert "diffusers" in refused(tmp_path)


def test_a_tree_cut_in_half_is_one_clear_error(graphpatch, llama_tree, tmp_path):
    text = llama_tree.read_text()
    half = tmp_path / "half.tree"
    half.write_text(text[: len(text) // 2])
    ran = graphpatch("match", "q_proj", "--model", half)
    assert ran.code == 2 and ran.err.startswith("error GP43") and "half.tree" in ran.err
    assert "internal error" not in ran.err
