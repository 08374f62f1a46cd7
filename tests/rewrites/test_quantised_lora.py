"""LoRA beside weights that libraries keep as codes: against PEFT on the same base, and by class interface."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerGroup
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TorchAoConfig

import graphpatch

IDS = torch.arange(24).reshape(3, 8) % 50
CONFIGS = {"int8": Int8WeightOnlyConfig(), "int4": IntxWeightOnlyConfig(torch.int4, PerGroup(32))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=50,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def loaded(folder, kind: str) -> nn.Module:
    config = TorchAoConfig(CONFIGS[kind])
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32).eval()


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("options", ["", ", dora=true", ", use_rslora=true"])
def test_on_a_model_loaded_with_torchao_it_is_pefts(folder, kind, options):
    ours, base = loaded(folder, kind), loaded(folder, kind)
    text = f"patch **.{{q,down}}_proj with lora(rank=4, alpha=8{options})\nfreeze ** except @new"
    patch = graphpatch.apply(ours, graphpatch.parse(text))
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], use_dora="dora" in options,
        use_rslora="rslora" in options,
    )  # fmt: skip
    theirs = peft.get_peft_model(base, config).eval()
    pairs = []
    for name, module in ours.named_modules():
        if "lora_A" in module._parameters:
            other = theirs.get_submodule(f"base_model.model.{name}")
            pairs.append((module.lora_A, other.lora_A["default"].weight))
            pairs.append((module.lora_B, other.lora_B["default"].weight))
            if "dora" in options:
                torch.testing.assert_close(module.lora_magnitude, other.lora_magnitude_vector["default"].weight)
    assert len(pairs) == 8
    with torch.no_grad():
        for one, two in pairs:
            two.copy_(one.normal_(std=0.1))
    for model in (ours, theirs):
        model(input_ids=IDS, labels=IDS).loss.backward()
    torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, atol=1e-5, rtol=1e-5)
    for one, two in pairs:
        torch.testing.assert_close(one.grad, two.grad, atol=1e-5, rtol=1e-4)
    expected = ours(IDS).logits
    with pytest.warns(UserWarning, match="rounded to codes anew"):
        patch.merge()
    if kind == "int8":
        torch.testing.assert_close(ours(IDS).logits, expected, atol=0.05, rtol=0.05)  # nothing but rounding
    if "dora" not in options:  # where PEFT's torchao layer merges B A alone, as if there were no magnitude
        theirs.merge_adapter()
        torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, atol=1e-4, rtol=1e-4)
    patch.unmerge()
    assert torch.equal(ours(IDS).logits, expected)
    patch.revert()
    assert torch.equal(ours(IDS).logits, loaded(folder, kind)(IDS).logits)


# ── linears of libraries that cannot run here: stand-ins with the interface that they document ──


class _Linear(nn.Module):
    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("bias", torch.randn(out_features))
        self.register_buffer("codes", torch.randint(-8, 8, (out_features, in_features), dtype=torch.int8))

    def forward(self, x):
        return x @ (self.codes.to(x.dtype) / 16).t() + self.bias


def stand_in(qualified: str, base: type = _Linear) -> type:
    module, _, name = qualified.rpartition(".")
    return type(name, (base,), {"__module__": module})


class _HQQ(_Linear):
    """`hqq.core.quantize.HQQLinear` keeps its codes as `W_q`, and gives the dense weight by `dequantize()`."""

    def dequantize(self):
        return self.codes.float() / 16


class _Marlin(stand_in("gptqmodel.nn_modules.qlinear.BaseQuantLinear")):
    pass


LINEARS = {
    "hqq": stand_in("hqq.core.quantize.HQQLinear", _HQQ),
    "gptq": _Marlin,
    "awq": stand_in("awq.modules.linear.gemm.WQLinear_GEMM"),
    "awq gemv": stand_in("awq.modules.linear.gemv.WQLinear_GEMV"),
}


@pytest.mark.parametrize("kind", LINEARS)
def test_a_stand_in_of_another_library_gains_the_low_rank_product(kind):
    torch.manual_seed(0)
    model = nn.Sequential(LINEARS[kind](12, 10))
    x = torch.randn(5, 12, requires_grad=True)
    before = model(x).detach()
    patch = graphpatch.apply(model, graphpatch.parse("patch ^0 with lora(rank=3, alpha=6)\nfreeze ** except @new"))
    layer = model[0]
    assert torch.equal(model(x), before) and layer.lora_A.dtype == torch.float32
    with torch.no_grad():
        layer.lora_B.normal_()
    output = model(x)
    torch.testing.assert_close(output, before + 2 * x @ layer.lora_A.t() @ layer.lora_B.t())
    output.sum().backward()
    weight = layer.codes.float() / 16 + 2 * layer.lora_B @ layer.lora_A
    torch.testing.assert_close(x.grad, weight.sum(0).expand(5, 12))
    with pytest.raises(graphpatch.ApplyError) as caught:
        patch.merge()
    assert caught.value.code == "GP531"
    patch.revert()
    assert torch.equal(model(x), before) and type(layer) is LINEARS[kind]


def test_what_needs_the_dense_weight_asks_for_it_or_is_refused():
    model = nn.Sequential(LINEARS["hqq"](12, 10), LINEARS["awq"](10, 6))
    graphpatch.apply(model, graphpatch.parse("patch ^0 with lora(rank=3, dora=true)\nfreeze ** except @new"))
    torch.testing.assert_close(model[0].lora_magnitude, (model[0].codes.float() / 16).norm(dim=1))
    with pytest.raises(graphpatch.ApplyError) as caught:
        graphpatch.apply(model, graphpatch.parse("patch ^1 with lora(rank=3, dora=true)\nfreeze ** except @new"))
    assert caught.value.code == "GP543" and "lora_A" not in model[1]._parameters


def test_a_parametrised_weight_is_the_one_that_it_computes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(12, 10)))
    graphpatch.apply(model, graphpatch.parse("patch ^0 with lora(rank=3, dora=true)\nfreeze ** except @new"))
    torch.testing.assert_close(model[0].lora_magnitude, model[0].weight.norm(dim=1))


def test_a_base_that_is_quantised_already_is_not_quantised_again():
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 32))
    quantize_(model, Int8WeightOnlyConfig(), lambda module, name: name == "1")
    before = dict(model.named_parameters())
    with pytest.raises(graphpatch.ApplyError) as caught:
        graphpatch.apply(model, graphpatch.parse("patch *:Linear with quantize.int8()\nfreeze **"))
    assert caught.value.code == "GP462" and "`1`" in str(caught.value)
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
