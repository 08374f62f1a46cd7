"""Quantised weights: the numbers against torchao and formulas, the tensor wherever a weight goes, every library's kind."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from torchao.quantization import (
    Int8Tensor,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    NF4Tensor,
    quantize_,
)
from torchao.quantization.granularity import PerGroup, PerRow
from torchao.quantization.quant_primitives import MappingType, _choose_qparams_affine_tinygemm

import graphpatch
from graphpatch.rewrites.quantised import dequantised, is_quantised, requantised
from graphpatch.rewrites.quantised_formats import NF4, NORMAL_FLOAT, Int4, Int8, encode
from graphpatch.rewrites.quantised_tensor import QuantisedTensor

FORMATS = [NF4(64), NF4(32), Int8(), Int4(32)]


def quantised_linear(format, dtype=torch.float32, rows=96, columns=128) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(columns, rows, dtype=dtype)
    layer.weight = nn.Parameter(QuantisedTensor.of(layer.weight, format), requires_grad=False)
    return layer


# ── the numbers ──


def test_the_levels_of_nf4_are_the_quantiles_that_the_paper_takes():
    normal, offset = torch.distributions.Normal(0.0, 1.0), 0.9677083
    positive = normal.icdf(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -normal.icdf(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat([negative, torch.zeros(1, dtype=torch.float64), positive]).sort().values
    torch.testing.assert_close(
        torch.tensor(NORMAL_FLOAT, dtype=torch.float64), levels / levels.max(), atol=2e-7, rtol=0
    )


def test_nf4_takes_the_nearest_level_of_each_block():
    torch.manual_seed(1)
    weight = torch.randn(6, 128)
    scales = weight.view(6, 2, 64).abs().amax(-1, keepdim=True)
    levels = torch.tensor(NORMAL_FLOAT)
    nearest = ((weight.view(6, 2, 64) / scales).unsqueeze(-1) - levels).abs().argmin(-1)
    expected = (levels[nearest] * scales).view(6, 128)
    assert torch.equal(QuantisedTensor.of(weight, NF4(64)).dequantize(), expected)


def test_nf4_has_the_codes_of_torchaos_and_smaller_errors():
    torch.manual_seed(2)
    weight = torch.randn(64, 256)
    ours, theirs = QuantisedTensor.of(weight, NF4(64)), NF4Tensor.from_tensor(weight, 64, 256)
    same = ours.parts["codes"].flatten() == theirs.quantized_data
    assert same.float().mean() > 0.999  # torchao's levels have four digits
    ours_off = (ours.dequantize() - weight).abs().mean()
    assert ours_off <= (theirs.get_original_weight() - weight).abs().mean()


def test_int8_is_torchaos_bit_for_bit():
    torch.manual_seed(3)
    weight = torch.randn(48, 80)
    ours, theirs = QuantisedTensor.of(weight, Int8()), Int8Tensor.from_hp(weight, PerRow())
    assert torch.equal(ours.parts["codes"], theirs.qdata)
    assert torch.equal(ours.dequantize(), theirs.dequantize())


def test_int4_has_the_grid_of_torchaos():
    torch.manual_seed(4)
    weight = torch.randn(16, 128)
    steps, zeros = _choose_qparams_affine_tinygemm(weight, MappingType.ASYMMETRIC, (1, 32), torch.int32, 0, 15)
    ours = QuantisedTensor.of(weight, Int4(32))
    torch.testing.assert_close(ours.parts["steps"], steps.view(16, 4))
    torch.testing.assert_close(ours.parts["least"], (zeros - 8 * steps).view(16, 4))
    assert ((ours.dequantize() - weight).abs().view(16, 4, 32) <= steps.view(16, 4, 1) / 2 + 1e-6).all()


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_zeros_and_constants_and_huge_and_tiny_rows_come_back(format):
    rows = torch.stack([torch.zeros(64), torch.full((64,), 0.5), torch.full((64,), -1e30), torch.full((64,), 1e-30)])
    back = QuantisedTensor.of(rows, format).dequantize()
    assert torch.isfinite(back).all() and torch.equal(back[0], rows[0])
    torch.testing.assert_close(back[:3], rows[:3], rtol=0.005, atol=0)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_what_was_quantised_once_stays_what_it_is(format):
    once = QuantisedTensor.of(torch.randn(8, 128), format).dequantize()
    torch.testing.assert_close(QuantisedTensor.of(once, format).dequantize(), once, rtol=1e-2, atol=1e-6)


def test_a_large_weight_is_encoded_in_pieces_to_the_same_codes(monkeypatch):
    weight = torch.randn(10, 64)
    whole = encode(NF4(64), weight)
    monkeypatch.setattr("graphpatch.rewrites.quantised_formats._AT_ONCE", 192)
    pieces = encode(NF4(64), weight)
    assert whole.keys() == pieces.keys() and all(torch.equal(whole[k], pieces[k]) for k in whole)


# ── the tensor ──


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_a_linear_computes_with_the_dequantised_weight(format, dtype):
    layer = quantised_linear(format, dtype)
    dense = layer.weight.dequantize()
    for shape in [(128,), (4, 128), (2, 3, 128), (0, 128)]:
        x = torch.randn(shape, dtype=dtype, requires_grad=True)
        y = x.detach().clone().requires_grad_()
        ours, expected = layer(x), linear(y, dense, layer.bias)
        assert torch.equal(ours, expected)
        ours.square().sum().backward()
        expected.square().sum().backward()
        assert torch.equal(x.grad, y.grad)


def test_second_derivatives_and_forward_mode_pass_through():
    layer = quantised_linear(NF4(4), torch.float64, 3, 4)
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda t: layer(t).sin(), (x,))
    _, tangent = torch.func.jvp(layer, (x.detach(),), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, torch.ones_like(x) @ layer.weight.dequantize().t())


def test_backward_keeps_the_codes_and_no_dense_copy():
    kept: list[torch.Tensor] = []
    layer = quantised_linear(Int8())
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(2, 128, requires_grad=True))
    assert any(isinstance(t, QuantisedTensor) for t in kept)
    assert not any(type(t) is torch.Tensor and t.shape in [(96, 128), (128, 96)] for t in kept)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_copies_and_files_hold_the_same_codes(format, tmp_path):
    layer = quantised_linear(format)
    dense = layer.weight.dequantize()
    again = io.BytesIO()
    torch.save(layer, again)
    again.seek(0)
    torch.save(layer.state_dict(), tmp_path / "state.pt")
    other = quantised_linear(format)
    with torch.no_grad():
        other.weight.copy_(torch.zeros(96, 128))
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for one in (copy.deepcopy(layer), torch.load(again, weights_only=False), other):
        assert isinstance(one.weight, nn.Parameter) and not one.weight.requires_grad
        assert torch.equal(one.weight.dequantize(), dense)
        assert one.weight.parts["codes"].data_ptr() != layer.weight.parts["codes"].data_ptr()


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_a_checkpoint_of_the_base_loads_and_is_quantised(format):
    layer, base = quantised_linear(format), nn.Linear(128, 96)
    layer.load_state_dict(base.state_dict())
    assert torch.equal(layer.weight.dequantize(), QuantisedTensor.of(base.weight, format).dequantize())
    half = quantised_linear(format, torch.bfloat16)
    half.load_state_dict(base.state_dict())
    assert half.weight.dtype == torch.bfloat16
    torch.testing.assert_close(half.weight.dequantize().float(), layer.weight.dequantize(), rtol=0.01, atol=1e-3)


def test_moving_it_keeps_it_quantised():
    layer = quantised_linear(NF4(64))
    dense, parameter = layer.weight.dequantize(), layer.weight
    layer.to(torch.bfloat16)
    assert layer.weight is parameter and layer.weight.dtype == torch.bfloat16
    assert torch.equal(layer.weight.dequantize(), dense.bfloat16())
    layer.to(torch.float32)
    assert torch.equal(layer.weight.dequantize(), dense)  # the codes were never rounded
    layer.to("meta")
    assert layer.weight.is_meta and isinstance(layer.weight, QuantisedTensor)
    layer.to_empty(device="cpu")
    layer.load_state_dict({"weight": dense, "bias": torch.zeros(96)})
    assert isinstance(layer.weight, QuantisedTensor)
    torch.testing.assert_close(layer.weight.dequantize(), dense)


def test_autocast_and_compilation_compute_what_they_do_with_the_dense_weight():
    layer = quantised_linear(NF4(64))
    x = torch.randn(4, 128)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), linear(x, layer.weight.dequantize(), layer.bias))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))


def test_other_operations_see_the_dense_weight_and_none_writes():
    weight = quantised_linear(NF4(64)).weight
    dense = weight.dequantize()
    assert torch.equal(weight.norm(), dense.norm()) and torch.equal(weight[:3], dense[:3])
    assert torch.equal(torch.cat([weight, weight]), torch.cat([dense, dense]))
    assert torch.equal(weight.t().t().dequantize(), dense) and torch.equal(weight.mT.dequantize(), dense.mT)
    assert "NF4(block=64)" in repr(weight) and weight.nbytes == 96 * 128 // 2 + 4 * 96 * 2
    for write in (
        lambda: weight.add_(1),
        lambda: weight.zero_(),
        lambda: torch._foreach_add_([weight.data], 1.0),
        lambda: torch.mul(dense, 2, out=weight.data),
    ):
        with torch.no_grad(), pytest.raises(RuntimeError, match="write into a quantised weight"):
            write()
    assert torch.equal(weight.dequantize(), dense)


# ── the kinds of other libraries ──


def torchao_linear(config, dtype=torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(128, 96, dtype=dtype)
    quantize_(layer, config)
    return layer


def nf4_linear() -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(128, 96)
    layer.weight = nn.Parameter(NF4Tensor.from_tensor(layer.weight.detach(), 32, 64), requires_grad=False)
    return layer


KINDS = {
    "ours": lambda: quantised_linear(NF4(64)),
    "int8": lambda: torchao_linear(Int8WeightOnlyConfig()),
    "int8 by groups": lambda: torchao_linear(Int8WeightOnlyConfig(granularity=PerGroup(32))),
    "int8, bf16": lambda: torchao_linear(Int8WeightOnlyConfig(), torch.bfloat16),
    "intx": lambda: torchao_linear(IntxWeightOnlyConfig(torch.int4, PerGroup(32))),
    "intx, asymmetric": lambda: torchao_linear(
        IntxWeightOnlyConfig(torch.int4, PerGroup(32), mapping_type=MappingType.ASYMMETRIC)
    ),
    "nf4": nf4_linear,
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_value_goes_in_and_out_of_every_kind(kind):
    layer = KINDS[kind]()
    assert is_quantised(layer.weight)
    dense = dequantised(layer)
    assert dense.shape == (96, 128) and type(dense) is torch.Tensor
    x = torch.eye(128, dtype=dense.dtype)
    torch.testing.assert_close(linear(x, dense), layer(x) - layer.bias, rtol=0.02, atol=1e-3)
    value = dense + 0.01 * torch.randn_like(dense)
    new = requantised(layer, value)
    assert type(new) is type(layer.weight) and not new.requires_grad and new.dtype == layer.weight.dtype
    old_error = (dense - value).abs().mean()
    layer.weight = new
    assert (dequantised(layer) - value).abs().mean() < (0.9 if "int8" in kind else 1.5) * old_error
    # The same settings: what it was, quantised so again, is what it was.
    again = KINDS[kind]()
    again.weight = requantised(again, dequantised(again))
    torch.testing.assert_close(dequantised(again), dense, rtol=0.02, atol=0.005)


def test_a_plain_weight_is_itself_and_codes_of_unknown_kinds_are_refused():
    plain = nn.Linear(4, 4)
    assert not is_quantised(plain.weight) and dequantised(plain) is plain.weight
    plain.weight = nn.Parameter(torch.zeros(4, 2, dtype=torch.uint8), requires_grad=False)
    assert is_quantised(plain.weight)
    with pytest.raises(graphpatch.Error) as caught:
        dequantised(plain)
    assert caught.value.code == "GP543"
    with pytest.raises(graphpatch.Error) as caught:
        requantised(plain, torch.zeros(4, 4))
    assert caught.value.code == "GP544"


def test_what_a_library_refuses_is_said_in_one_sentence():
    layer = torchao_linear(Int8WeightOnlyConfig())
    layer.weight.act_pre_scale = torch.ones(128)
    with pytest.raises(graphpatch.Error) as caught:
        requantised(layer, torch.zeros(96, 128))
    assert caught.value.code == "GP544" and "scaled beforehand" in str(caught.value)
