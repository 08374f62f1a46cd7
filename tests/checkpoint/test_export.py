"""What is written for each reader, held against how that reader computes; folders that are left alone."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import graphpatch
from graphpatch import Error, Tree
from graphpatch.checkpoint.readers.export import export_adapter
from graphpatch.checkpoint.readers.table import READERS
from graphpatch.checkpoint.readers.validate import validate_adapter as validate
from tests.checkpoint import readers_common as common
from tests.checkpoint.held_in import files_of
from tests.checkpoint.test_portable import STACKS, logits, of_peft, ours, seeded

ROUND = "patch layers[1].**.{q_proj,down_proj} with lora(rank=4, alpha=3)\npatch ^lm_head with lora(rank=2)"


def saved(tmp_path: Path, text: str = ROUND, name: str = "llama") -> tuple[nn.Module, graphpatch.Patch, Path]:
    model, patch = ours(name, text)
    graphpatch.save_adapter(patch, tmp_path / "ours")
    return model, patch, tmp_path / "ours"


# ── mlx-lm ──


def test_mlx_computes_what_was_trained(tmp_path):
    model, patch, folder = saved(tmp_path)
    report = export_adapter(folder, tmp_path / "mlx", "mlx", base="org/llama")
    assert report.clean and report.effective == 5  # k and v beside q
    assert {file.name for file in (tmp_path / "mlx").iterdir()} == {"adapter_config.json", "adapters.safetensors"}
    config = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())
    assert config["fine_tune_type"] == "lora" and config["num_layers"] == 2 and config["model"] == "org/llama"
    said, tensors = config["lora_parameters"], load_file(tmp_path / "mlx" / "adapters.safetensors")
    before = dict(seeded("llama").named_parameters())
    patch.bake()
    for path in said["keys"]:
        a, b = tensors.pop(f"{path}.lora_a"), tensors.pop(f"{path}.lora_b")
        weight, trained = before[f"{path}.weight"], model.get_submodule(path).weight
        assert a.shape == (weight.shape[1], said["rank"]) and b.shape == (said["rank"], weight.shape[0])
        # LoRALinear.fuse of mlx_lm/tuner/lora.py
        torch.testing.assert_close(weight + (said["scale"] * b.T) @ a.T, trained, rtol=1e-5, atol=1e-6)
    assert not tensors and said["dropout"] == 0.0


def test_mlx_has_experts_in_stacks_of_its_own(tmp_path):
    base = seeded("mixtral")
    common.peft_adapter(tmp_path / "peft", seeded("mixtral"), target_parameters=STACKS)
    from peft import PeftModel

    merged = PeftModel.from_pretrained(seeded("mixtral"), tmp_path / "peft").merge_and_unload()
    report = export_adapter(tmp_path / "peft", tmp_path / "mlx", "mlx", model=base)
    assert report.clean
    tensors = load_file(tmp_path / "mlx" / "adapters.safetensors")
    before, after = files_of(base, tmp_path / "before"), files_of(merged, tmp_path / "after")
    for theirs, mine in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
        path = f"model.layers.1.block_sparse_moe.switch_mlp.{mine}"
        a, b = tensors[f"{path}.lora_a"], tensors[f"{path}.lora_b"]
        keys = [f"model.layers.1.block_sparse_moe.experts.{number}.{theirs}.weight" for number in range(4)]
        trained = torch.stack([after[key] - before[key] for key in keys])
        torch.testing.assert_close(b @ a, trained, rtol=1e-4, atol=1e-5)


def test_a_damaged_mlx_adapter_is_told(tmp_path):
    _, _, folder = saved(tmp_path)
    export_adapter(folder, tmp_path / "mlx", "mlx")
    config = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())

    def rows(**change) -> set[str]:
        said = {**config, "lora_parameters": {**config["lora_parameters"], **change}}
        (tmp_path / "mlx" / "adapter_config.json").write_text(json.dumps(said))
        return {finding.row.name for finding in validate(tmp_path / "mlx", seeded("llama"), "mlx").findings}

    assert rows() == set()
    assert rows(scale=None) == rows(rank=8) == rows(dropout="no") == {"settings"}
    assert rows(keys=["self_attn.q_proj"]) == {"keys"}
    assert validate(tmp_path / "mlx", seeded("llama"), "vllm").verdict("vllm") == "refused"


def test_names_that_mlx_has_otherwise_are_refused(tmp_path):
    _, _, folder = saved(tmp_path, "patch c_attn with lora(rank=4)", "gpt2")
    with pytest.raises(Error) as caught:
        export_adapter(folder, tmp_path / "out", "mlx")
    assert caught.value.code == "GP637" and "sanitize" in str(caught.value)


# ── diffusers ──


class UNet2DConditionModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(4, 8, 3, padding=1)
        self.down = nn.ModuleList([nn.ModuleDict({"to_q": nn.Linear(8, 8), "to_k": nn.Linear(8, 8)}) for _ in range(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv_in(x).flatten(2).mT
        for block in self.down:
            h = block["to_q"](h) + block["to_k"](h)
        return h


def diffusion(tmp_path: Path) -> tuple[nn.Module, Path]:
    torch.manual_seed(0)
    model = UNet2DConditionModel()
    text = "patch to_q with lora(rank=4, alpha=3)\npatch conv_in with lora(rank=2)\nfreeze ** except @new"
    patch = graphpatch.apply(model, graphpatch.parse(text))
    for parameter in patch.trainable_parameters():
        parameter.data.normal_()
    graphpatch.save_adapter(patch, tmp_path / "ours")
    return model, tmp_path / "ours"


def test_diffusers_gets_its_prefix_and_its_metadata(tmp_path):
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    model, folder = diffusion(tmp_path)
    report = export_adapter(folder, tmp_path / "out", "diffusers")
    assert report.clean and report.effective == 3
    (file,) = (tmp_path / "out").iterdir()
    assert file.name == "pytorch_lora_weights.safetensors"
    with safe_open(file, "pt") as opened:
        said = json.loads(opened.metadata()["lora_adapter_metadata"])
    assert said["unet.lora_alpha"] == said["unet.r"] == 4
    # As `load_lora_adapter` of diffusers/loaders/peft.py does it, with PEFT's own functions.
    tensors = {key.removeprefix("unet."): tensor for key, tensor in load_file(file).items()}
    assert set(map(str, load_file(file))) == {f"unet.{key}" for key in tensors}
    torch.manual_seed(0)
    base = UNet2DConditionModel()
    inject_adapter_in_model(LoraConfig(**{key.removeprefix("unet."): value for key, value in said.items()}), base)
    loaded = set_peft_model_state_dict(base, tensors)
    assert not loaded.unexpected_keys and not [key for key in loaded.missing_keys if "lora" in key]
    x = torch.randn(1, 4, 5, 5)
    torch.testing.assert_close(base(x), model(x), rtol=1e-4, atol=1e-5)


def test_which_part_of_a_pipeline_must_be_known(tmp_path):
    _, _, folder = saved(tmp_path)
    with pytest.raises(Error) as caught:
        export_adapter(folder, tmp_path / "out", "diffusers")
    assert caught.value.code == "GP639" and "--part" in str(caught.value)
    assert export_adapter(folder, tmp_path / "out", "diffusers", part="text_encoder").clean
    assert all(
        key.startswith("text_encoder.") for key in load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    )


def test_without_metadata_alpha_is_taken_to_be_the_rank(tmp_path):
    from safetensors.torch import save_file

    _, folder = diffusion(tmp_path)
    export_adapter(folder, tmp_path / "out", "diffusers")
    file = tmp_path / "out" / "pytorch_lora_weights.safetensors"
    tensors = {key: value.clone() for key, value in load_file(file).items()}
    save_file({**tensors, "extra": torch.zeros(1)}, file)
    assert {f.row.name for f in validate(tmp_path / "out", None, "diffusers").findings} == {"alpha", "key"}


def test_keys_without_a_part_have_an_effect_on_the_model_and_none_in_a_pipeline(tmp_path):
    """What `save_lora_adapter` of a diffusers model writes, as opposed to `save_lora_weights` of a pipeline."""
    from safetensors.torch import save_file

    _, folder = diffusion(tmp_path)
    export_adapter(folder, tmp_path / "out", "diffusers")
    file = tmp_path / "out" / "pytorch_lora_weights.safetensors"
    with safe_open(file, "pt") as opened:
        said = json.loads(opened.metadata()["lora_adapter_metadata"])
    said = json.dumps({key.removeprefix("unet."): value for key, value in said.items()})
    tensors = {key.removeprefix("unet."): value.clone() for key, value in load_file(file).items()}
    save_file(tensors, file, {"lora_adapter_metadata": said, "format": "pt"})
    report = validate(tmp_path / "out", Tree.of(UNet2DConditionModel()), "diffusers")
    assert report.effective == 3 and [f.row.name for f in report.findings] == ["part"]
    assert report.verdict("diffusers") == "misread"
    (finding,) = report.findings
    assert "prefix=None" in finding.row.fix


# ── profiles ──


def test_the_profile_of_peft_is_held_against_the_reader_too(tmp_path):
    text = "patch {q,v}_proj with lora(rank=4, alpha=3, use_rslora=true)"
    _, _, folder = saved(tmp_path, text)
    assert export_adapter(folder, tmp_path / "out", "vllm", profile="peft").clean
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["use_rslora"] is True
    with pytest.raises(Error) as caught:
        export_adapter(folder, tmp_path / "no", "sglang", profile="peft")
    assert caught.value.code == "GP637" and "sglang#40835" in str(caught.value) and not (tmp_path / "no").exists()
    assert export_adapter(folder, tmp_path / "no", "sglang").clean


def test_models_whose_experts_a_server_keeps_in_stacks_get_them_so(tmp_path):
    model, _, folder = saved(tmp_path, "patch experts.{gate_up_proj,down_proj} with lora(rank=4, alpha=3)", "gpt_oss")
    report = export_adapter(folder, tmp_path / "vllm", "vllm")
    assert report.clean and {path.rpartition("mlp.")[2] for path in report.adapter.factors} == {
        "experts",
        "experts.base_layer",
    }
    torch.testing.assert_close(
        logits(of_peft(tmp_path / "vllm", seeded("gpt_oss"))), logits(model), rtol=1e-4, atol=1e-5
    )
    for reader in ("sglang", "llamacpp", "mlx"):
        with pytest.raises(Error) as caught:
            export_adapter(folder, tmp_path / "no", reader)
        assert caught.value.code == "GP635" and "hold experts in stacks" in str(caught.value)
    _, _, folder = saved(tmp_path / "half", "patch experts.down_proj with lora(rank=4)", "gpt_oss")
    with pytest.raises(Error) as caught:
        export_adapter(folder, tmp_path / "no", "vllm")
    assert caught.value.code == "GP637" and "a stack needs both pairs" in str(caught.value)


def test_to_peft_writes_the_portable_profile(tmp_path):
    _, patch, folder = saved(tmp_path)
    graphpatch.to_peft(patch, tmp_path / "patch", profile="portable")
    export_adapter(folder, tmp_path / "file", "tgi")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "patch" / name).read_bytes() == (tmp_path / "file" / name).read_bytes()


@pytest.mark.parametrize("reader", ["vllm", "sglang", "trtllm", "llamacpp", "ollama", "tgi", "peft", "mlx"])
def test_every_reader_of_language_models_gets_what_it_accepts(tmp_path, reader):
    _, _, folder = saved(
        tmp_path, "patch layers[0].**.q_proj with lora(rank=4)\npatch layers[1].**.up_proj with lora(rank=2, alpha=8)"
    )
    report = export_adapter(folder, tmp_path / "out", reader)
    assert report.clean and report.verdict(reader) == "accepted" and report.adapter.folder == str(tmp_path / "out")
    assert validate(tmp_path / "out", seeded("llama"), reader).clean
    assert reader in READERS


def test_sglang_has_its_own_names_for_experts_in_the_list_of_targets(tmp_path):
    _, _, folder = saved(tmp_path, "patch experts.{gate_up_proj,down_proj} with lora(rank=4)", "mixtral")
    assert export_adapter(folder, tmp_path / "vllm", "vllm").clean
    assert "target names" in {f.row.name for f in validate(tmp_path / "vllm", seeded("mixtral"), "sglang").findings}
    assert export_adapter(folder, tmp_path / "sglang", "sglang").clean
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("vllm", "sglang")]
    assert [config["target_modules"] for config in configs] == [
        ["w1", "w2", "w3"],
        ["down_proj", "gate_proj", "up_proj"],
    ]
    keys = [set(load_file(tmp_path / name / "adapter_model.safetensors")) for name in ("vllm", "sglang")]
    assert keys[0] == keys[1]


def test_latent_attention_is_complete_for_sglang(tmp_path):
    _, _, folder = saved(tmp_path, "patch layers[1].**.q_a_proj with lora(rank=4)", "deepseek_v3")
    report = export_adapter(folder, tmp_path / "out", "sglang")
    assert report.clean and {path.rpartition(".")[2] for path in report.adapter.factors} == {
        "q_a_proj",
        "kv_a_proj_with_mqa",
    }
    _, _, folder = saved(tmp_path / "b", "patch kv_b_proj with lora(rank=4)", "deepseek_v3")
    with pytest.raises(Error, match="taken apart"):
        export_adapter(folder, tmp_path / "mlx", "mlx")


# ── folders ──


def snapshot(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


@pytest.mark.parametrize("name", ["config.json", "model_index.json", "adapter.safetensors", "adapters.safetensors"])
def test_a_folder_that_holds_something_else_is_left_alone(tmp_path, name):
    _, patch, folder = saved(tmp_path)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / name).write_text("{}")
    for write in (
        lambda: export_adapter(folder, tmp_path / "base", "vllm"),
        lambda: graphpatch.to_peft(patch, tmp_path / "base", profile="portable"),
    ):
        with pytest.raises(Error) as caught:
            write()
        assert caught.value.code == "GP636" and snapshot(tmp_path / "base") == {name: b"{}"}


def test_an_adapter_is_not_written_over_itself(tmp_path):
    _, _, folder = saved(tmp_path)
    before = snapshot(folder)
    with pytest.raises(Error) as caught:
        export_adapter(folder, folder, "vllm")
    assert caught.value.code == "GP636" and snapshot(folder) == before


def test_what_cannot_be_written_leaves_what_was_there(tmp_path, monkeypatch):
    _, _, folder = saved(tmp_path)
    export_adapter(folder, tmp_path / "out", "vllm", base="first")
    before = snapshot(tmp_path / "out")

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("graphpatch.checkpoint.readers.folder.save_file", full)
    with pytest.raises(Error) as caught:
        export_adapter(folder, tmp_path / "out", "vllm", base="second")
    assert caught.value.code == "GP604" and snapshot(tmp_path / "out") == before
    assert [entry.name for entry in (tmp_path / "out").iterdir() if entry.is_dir()] == []
    with pytest.raises(Error):
        export_adapter(folder, tmp_path / "new", "vllm")
    assert not (tmp_path / "new").exists()


def test_a_crash_between_the_files_leaves_no_pair_that_does_not_belong_together(tmp_path, monkeypatch):
    _, _, folder = saved(tmp_path)
    export_adapter(folder, tmp_path / "out", "vllm", base="first")
    replace = os.replace

    def killed(source, target):
        if str(target).endswith("adapter_config.json"):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        export_adapter(folder, tmp_path / "out", "vllm", base="second")
    assert not (tmp_path / "out" / "adapter_config.json").exists()


def test_a_damaged_source_is_told(tmp_path):
    _, _, folder = saved(tmp_path)
    file = folder / "adapter.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(Error) as caught:
        export_adapter(folder, tmp_path / "out", "vllm")
    assert caught.value.code == "GP603" and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"reader": "vllm,sglang"}, "one reader at a time"),
        ({"reader": "mlx", "profile": "peft"}, "does not read PEFT's format"),
        ({"reader": "vllm", "profile": "plain"}, "no profile called"),
        ({"reader": "vllm", "part": "unet"}, "no effect for vllm"),
        ({"reader": "diffusers", "part": "unet", "base": "x"}, "no effect for diffusers"),
    ],
)
def test_arguments_without_effect_are_errors(tmp_path, options, says):
    _, _, folder = saved(tmp_path)
    with pytest.raises(Error) as caught:
        export_adapter(folder, tmp_path / "out", **options)
    assert caught.value.code == "GP639" and says in str(caught.value)


def test_an_adapter_of_peft_needs_its_base(tmp_path):
    common.peft_adapter(tmp_path / "peft", seeded("llama"))
    with pytest.raises(Error, match="--model M"):
        export_adapter(tmp_path / "peft", tmp_path / "out", "vllm")
    with pytest.raises(Error, match="already"):
        export_adapter(tmp_path / "peft", tmp_path / "out", "vllm", profile="peft", model=seeded("llama"))
    with pytest.raises(Error) as caught:
        export_adapter(tmp_path / "peft", tmp_path / "out", "vllm", model=seeded("gpt2"))
    assert caught.value.code == "GP635" and "no module of the model" in str(caught.value)
    export_adapter(tmp_path / "peft", tmp_path / "mlx", "mlx", model=seeded("llama"))
    with pytest.raises(Error, match="as mlx reads it"):
        export_adapter(tmp_path / "mlx", tmp_path / "out", "vllm", model=seeded("llama"))


def test_the_served_model_decides(tmp_path):
    """Where the model that is served has other names, that is told before anything is written."""
    _, _, folder = saved(tmp_path)
    with pytest.raises(Error) as caught:
        export_adapter(folder, tmp_path / "out", "vllm", model=seeded("gpt2"))
    assert caught.value.code == "GP637" and not (tmp_path / "out").exists()


def test_an_older_export_is_replaced_and_other_files_stay(tmp_path):
    _, _, folder = saved(tmp_path)
    export_adapter(folder, tmp_path / "out", "vllm", base="first")
    (tmp_path / "out" / "README.md").write_text("mine")
    export_adapter(folder, tmp_path / "out", "sglang", base="second")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == "second"
    assert (tmp_path / "out" / "README.md").read_text() == "mine"
    mode = (tmp_path / "out" / "adapter_model.safetensors").stat().st_mode
    assert mode == (tmp_path / "out" / "adapter_config.json").stat().st_mode
    shutil.rmtree(tmp_path / "out")
