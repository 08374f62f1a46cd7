"""The portable profile: the eight steps, on adapters of ours and of PEFT's making; PEFT itself; and what is refused."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import graphpatch
from graphpatch import Error, Tree
from graphpatch.checkpoint.readers.export import export_adapter, write_portable
from graphpatch.checkpoint.readers.validate import validate_adapter as validate
from tests.checkpoint import readers_common as common
from tests.checkpoint.held_in import files_of, held_in

IDS = torch.arange(10).view(2, 5)
MODELS = {
    name: getattr(common, name)
    for name in ("llama", "qwen2", "gemma2", "mixtral", "qwen3_moe", "gpt2", "deepseek_v3", "gpt_oss")
}
STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
LINEARS = {
    "gpt2": ["c_attn", "c_proj"],
    "qwen2": ["q_proj", "k_proj", "up_proj", "embed_tokens"],
    "mixtral": ["q_proj", "o_proj"],
    "qwen3_moe": ["q_proj", "v_proj"],
}
OPTIONS = {
    "plain": {},
    "rslora": {"use_rslora": True, "lora_alpha": 3},
    "patterns": {
        "rank_pattern": {"layers.0.self_attn.q_proj": 8, "h.0.attn.c_attn": 8},
        "alpha_pattern": {"v_proj": 3},
    },
    "one layer": {"layers_to_transform": [1]},
}


def seeded(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]().eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def of_peft(folder: Path, base: nn.Module, strict: bool = True) -> nn.Module:
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("error" if strict else "ignore", UserWarning)  # missing or unexpected keys
        warnings.filterwarnings("ignore", message=".*(tied|MoE|mixture).*")
        return PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()


# ── the eight steps ──


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("deepseek_v3", "gpt_oss")])
def test_the_eight_steps_on_adapters_of_peft(name, options, tmp_path):
    base = seeded(name)
    stacks = STACKS if name in ("mixtral", "qwen3_moe") and options != "one layer" else None
    config = {"target_modules": LINEARS.get(name, ["q_proj", "k_proj", "up_proj"]), **OPTIONS[options]}
    common.peft_adapter(tmp_path / "peft", copy.deepcopy(base), target_parameters=stacks, **config)
    merged = of_peft(tmp_path / "peft", base)
    expected = logits(merged)
    merged = merged.merge_and_unload()

    report = export_adapter(tmp_path / "peft", tmp_path / "out", "vllm", model=base)
    assert report.clean and report.effective == len(report.adapter.factors)
    before, after = files_of(base, tmp_path / "before"), files_of(merged, tmp_path / "after")
    held_in(tmp_path / "out", before, after, transposed=name == "gpt2")
    # PEFT reads it too, and computes the same.
    torch.testing.assert_close(logits(of_peft(tmp_path / "out", base)), expected, rtol=1e-4, atol=1e-5)


RULES = {
    "plain": "patch {targets} with lora(rank=4, alpha=8)",
    "rslora": "patch {targets} with lora(rank=4, alpha=3, use_rslora=true)",
    "ranks": "patch {stack}[0].**.{first} with lora(rank=8, alpha=3)\npatch {stack}[1].**.{first} with lora(rank=2)",
    "pissa": 'patch {targets} with lora(rank=4, alpha=3, init="pissa")',
}


def ours(name: str, text: str) -> tuple[nn.Module, graphpatch.Patch]:
    """A patched model whose factors are not those it started with."""
    model = seeded(name)
    gpt2 = name == "gpt2"
    words = {
        "targets": "{c_attn,c_proj}" if gpt2 else "{q,k}_proj",
        "first": "c_attn" if gpt2 else "q_proj",
        "stack": "h" if gpt2 else "layers",
    }
    for word, value in words.items():
        text = text.replace("{" + word + "}", value)
    patch = graphpatch.apply(model, graphpatch.parse("freeze ** except @new\n" + text))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in patch.trainable_parameters():
            parameter += torch.randn(parameter.shape, generator=generator) * 0.1
    return model, patch


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "gpt2", "mixtral"])
def test_the_eight_steps_on_adapters_of_ours(name, rules, tmp_path):
    model, patch = ours(name, RULES[rules])
    graphpatch.save_adapter(patch, tmp_path / "ours")
    write_portable(patch, tmp_path / "patch", base="org/model")
    expected = logits(model)
    report = export_adapter(tmp_path / "ours", tmp_path / "out", "vllm", base="org/model")
    assert report.clean
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "patch" / file).read_bytes()

    patch.bake()
    base = seeded(name)
    held_in(tmp_path / "out", files_of(base, tmp_path / "before"), files_of(model, tmp_path / "after"), name == "gpt2")
    torch.testing.assert_close(logits(of_peft(tmp_path / "out", base)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stacks", ["experts.gate_up_proj", "experts.down_proj", "experts.{gate_up_proj,down_proj}"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_the_eight_steps_on_our_experts(name, stacks, tmp_path):
    model, patch = ours(name, f"patch {stacks} with lora(rank=4, alpha=3)\npatch v_proj with lora(rank=2)")
    graphpatch.save_adapter(patch, tmp_path / "ours")
    report = export_adapter(tmp_path / "ours", tmp_path / "out", "llamacpp")
    assert report.clean and report.effective == 2 * (3 + 3 * 4)
    expected = logits(model)
    patch.bake()
    base = seeded(name)
    held_in(tmp_path / "out", files_of(base, tmp_path / "before"), files_of(model, tmp_path / "after"))
    torch.testing.assert_close(logits(of_peft(tmp_path / "out", base)), expected, rtol=1e-4, atol=1e-5)


def test_dense_layers_beside_experts(tmp_path):
    """Servers read them; PEFT would take them for experts, so for it they are written as it writes them."""
    model, patch = ours("deepseek_v3", "patch {o_proj,gate_proj,up_proj,down_proj}:Linear with lora(rank=4, alpha=3)")
    graphpatch.save_adapter(patch, tmp_path / "ours")
    report = export_adapter(tmp_path / "ours", tmp_path / "out", "vllm")
    assert report.clean and report.effective == 2 + 3 + 3
    assert validate(tmp_path / "out", seeded("deepseek_v3"), "peft").verdict("peft") == "misread"
    assert export_adapter(tmp_path / "ours", tmp_path / "peft", "peft").clean
    expected = logits(model)
    base = seeded("deepseek_v3")
    torch.testing.assert_close(logits(of_peft(tmp_path / "peft", base)), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(of_peft(tmp_path / "out", base, strict=False)), expected, rtol=1e-4, atol=1e-5)
    patch.bake()
    held_in(tmp_path / "out", files_of(base, tmp_path / "before"), files_of(model, tmp_path / "after"))


# ── what it consists of ──


def exported(tmp_path: Path, text: str, name: str = "llama", reader: str = "vllm", **options) -> Path:
    _, patch = ours(name, text)
    graphpatch.save_adapter(patch, tmp_path / "ours")
    export_adapter(tmp_path / "ours", tmp_path / "out", reader, **options)
    return tmp_path / "out"


def config_of(folder: Path) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


def test_peft_makes_the_modules_of_the_file_and_no_others(tmp_path):
    folder = exported(tmp_path, "patch layers[0].**.down_proj with lora(rank=4)")
    assert config_of(folder)["target_modules"] == ["down_proj"]
    assert config_of(folder)["exclude_modules"] == ["model.layers.1.mlp.down_proj"]
    made = [name for name, _ in of_peft(folder, seeded("llama")).named_modules() if name.endswith("lora_A.default")]
    assert made == ["base_model.model.model.layers.0.mlp.down_proj.lora_A.default"]


class Towers(nn.Module):
    """`encoder.proj` is the end of the name `inner.encoder.proj`, so that PEFT's exclusion of one takes both."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"proj": nn.Linear(4, 4)})
        self.inner = nn.ModuleDict({"encoder": nn.ModuleDict({"proj": nn.Linear(4, 4)})})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner["encoder"]["proj"](self.encoder["proj"](x))


def test_a_module_that_cannot_be_excluded_gets_zeros(tmp_path):
    torch.manual_seed(0)
    model = Towers()
    base, x = copy.deepcopy(model), torch.randn(2, 4)
    patch = graphpatch.apply(
        model, graphpatch.parse("patch inner.encoder.proj with lora(rank=2)\nfreeze ** except @new")
    )
    patch.trainable_parameters()[1].data.normal_()
    write_portable(patch, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert not tensors["base_model.model.encoder.proj.lora_B.weight"].any()
    torch.testing.assert_close(of_peft(tmp_path / "out", base)(x), model(x))


def test_what_a_server_stacks_is_complete(tmp_path):
    folder = exported(tmp_path, "patch layers[1].**.{k_proj,up_proj} with lora(rank=4)", reader="sglang")
    tensors = load_file(folder / "adapter_model.safetensors")
    paths = {key.split(".lora")[0].rpartition(".")[2] for key in tensors}
    assert paths == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
    zero = {key for key, value in tensors.items() if "lora_B" in key and not value.any()}
    assert {key.split(".lora")[0].rpartition(".")[2] for key in zero} == {"q_proj", "v_proj", "gate_proj"}


def test_a_scale_is_folded_without_loss_where_it_can_be(tmp_path):
    half = exported(tmp_path, 'patch q_proj with lora(rank=4, alpha=8, dtype="bfloat16")')
    assert {t.dtype for t in load_file(half / "adapter_model.safetensors").values()} >= {torch.bfloat16}
    third = exported(tmp_path, 'patch q_proj with lora(rank=3, alpha=1, dtype="bfloat16")')
    tensors = load_file(third / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    assert tensors[key].dtype == torch.float32
    original = load_file(tmp_path / "ours" / "adapter.safetensors")["model.layers.0.self_attn.q_proj.lora_B"]
    torch.testing.assert_close(tensors[key], original.float() / 3, rtol=1e-6, atol=0)


def test_the_same_adapter_gives_the_same_bytes(tmp_path):
    first = exported(tmp_path, RULES["plain"])
    once = {file.name: file.read_bytes() for file in first.iterdir()}
    export_adapter(tmp_path / "ours", tmp_path / "out", "vllm")
    assert {file.name: file.read_bytes() for file in first.iterdir()} == once
    assert set(once) == {"adapter_config.json", "adapter_model.safetensors"}


def test_the_base_is_named_where_it_is_known(tmp_path):
    assert config_of(exported(tmp_path, RULES["plain"], base="org/llama"))["base_model_name_or_path"] == "org/llama"
    model = seeded("llama")
    model.config._name_or_path = "/models/llama"
    patch = graphpatch.apply(model, graphpatch.parse("patch q_proj with lora(rank=4)\nfreeze ** except @new"))
    write_portable(patch, tmp_path / "named")
    assert config_of(tmp_path / "named")["base_model_name_or_path"] == "/models/llama"


def test_convolutions(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 4, 1))
    base, x = copy.deepcopy(model), torch.randn(2, 4, 5, 5)
    patch = graphpatch.apply(model, graphpatch.parse("patch :Conv2d with lora(rank=2, alpha=3)\nfreeze ** except @new"))
    for parameter in patch.trainable_parameters():
        parameter.data.normal_()
    write_portable(patch, tmp_path / "out")
    torch.testing.assert_close(of_peft(tmp_path / "out", base)(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("module", "says"),
    [
        (nn.Conv1d(4, 6, 3, dilation=2), "without dilation"),
        (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), "pads with 'reflect'"),
        (nn.Conv1d(4, 6, 3, groups=2), "with groups"),
        (nn.ConvTranspose1d(4, 6, 3), "a transposed convolution"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_convolutions_that_peft_computes_otherwise_are_refused(tmp_path, module, says):
    patch = graphpatch.apply(
        nn.Sequential(module), graphpatch.parse("patch :*Conv* with lora(rank=2)\nfreeze ** except @new")
    )
    with pytest.raises(Error) as caught:
        write_portable(patch, tmp_path / "out")
    assert caught.value.code == "GP635" and says in str(caught.value)


def test_the_model_itself_has_no_name(tmp_path):
    patch = graphpatch.apply(nn.Linear(4, 4), graphpatch.parse("patch ^ with lora(rank=2)\nfreeze ** except @new"))
    with pytest.raises(Error, match="on the model itself"):
        write_portable(patch, tmp_path / "out")


# ── what is refused ──


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("patch q_proj with lora(rank=4, dora=true)", "vllm, sglang and diffusers refuse or drop it"),
        ("patch :*Norm with scale.output(2.0)\npatch q_proj with lora(rank=4)", "no change of a weight"),
        ("patch q_proj with lora(rank=4)\ntrain norm", "model.norm.weight trained as a whole"),
        ("patch :*Norm with scale.output(2.0)", "no change of a weight"),
    ],
)
def test_what_has_no_portable_form_is_refused_with_who_refuses_it(text, says, tmp_path):
    _, patch = ours("llama", text)
    with pytest.raises(Error) as caught:
        write_portable(patch, tmp_path / "out")
    assert caught.value.code == "GP635" and says in str(caught.value)
    assert not (tmp_path / "out").exists()
    graphpatch.save_adapter(patch, tmp_path / "ours")
    with pytest.raises(Error) as caught:
        export_adapter(tmp_path / "ours", tmp_path / "out", "sglang")
    assert caught.value.code == "GP635" and not (tmp_path / "out").exists()


def test_a_trained_bias_is_refused(tmp_path):
    _, patch = ours("qwen2", "patch q_proj with lora(rank=4, bias=true)")
    with pytest.raises(Error, match="its bias trained; vllm"):
        write_portable(patch, tmp_path / "out")


def test_whole_adapters_of_peft_that_servers_refuse_are_refused(tmp_path):
    base = seeded("llama")
    for number, config in enumerate(
        [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"bias": "lora_only"}, {"init_lora_weights": "pissa"}]
    ):
        folder = tmp_path / str(number)
        common.peft_adapter(folder, copy.deepcopy(base), **config)
        with pytest.raises(Error) as caught:
            export_adapter(folder, tmp_path / "out", "vllm", model=base)
        assert caught.value.code == "GP635" and not (tmp_path / "out").exists()


def test_a_reverted_patch_has_nothing_to_write(tmp_path):
    _, patch = ours("llama", RULES["plain"])
    patch.revert()
    with pytest.raises(Error) as caught:
        write_portable(patch, tmp_path / "out")
    assert caught.value.code == "GP509"


def test_validate_accepts_what_is_written(tmp_path):
    folder = exported(tmp_path, RULES["ranks"])
    assert validate(folder, Tree.of(seeded("llama")), "vllm,sglang,trtllm,llamacpp,ollama,tgi,peft").clean
