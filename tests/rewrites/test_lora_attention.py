"""LoRA on `nn.MultiheadAttention`: against PEFT, and against the module's own forward with patched weights."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import graphpatch

from ..patch.common import randomise, refused, state

FREEZE = "\nfreeze ** except @new"


class Model(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, **options)

    def forward(self, *args: Tensor, **kwargs: Any) -> Any:
        return self.attn(*args, **kwargs)


FORMS: dict[str, dict[str, Any]] = {
    "fused": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False},
    "dropout": {"dropout": 0.3},
    "extra keys": {"add_bias_kv": True, "add_zero_attn": True},
    "separate": {"kdim": 6, "vdim": 4},
}
every = pytest.mark.parametrize("form", FORMS)


def model(form: str, dtype: torch.dtype = torch.float32) -> Model:
    torch.manual_seed(0)
    made = Model(**FORMS[form])
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.4)
    return made.to(dtype)


def inputs(form: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(2)
    widths = (8, 6, 4) if form == "separate" else (8, 8, 8)
    return [torch.randn(4, 4, width, dtype=dtype, requires_grad=True) for width in widths]


def apply(made: nn.Module, arguments: str = "", trained: bool = True, **options: Any) -> graphpatch.Patch:
    rule = f"patch :MultiheadAttention with lora(rank=2, alpha=3{arguments}){FREEZE}"
    patch = graphpatch.apply(made, graphpatch.parse(rule), **options)
    if trained:
        randomise(patch)
    return patch


def weights(plain: Model, patched: Model, parts: str = "", tail: str = "") -> dict[str, Tensor]:
    """The weights with what they gain, part by part."""
    found, attn = dict(plain.named_parameters()), patched.attn
    for name in ("in_proj", "q_proj", "k_proj", "v_proj", "out_proj"):
        a, b = (getattr(attn, f"{name}_lora_{ab}{tail}", None) for ab in "AB")
        key = f"attn.{name}.weight" if name == "out_proj" else f"attn.{name}_weight"
        if a is None:
            continue
        if name == "in_proj" and parts:
            rows = dict(zip(parts, zip(a.split(2), b.split(8))))
            delta = torch.cat([rows[p][1] @ rows[p][0] if p in rows else torch.zeros(8, 8) for p in "qkv"])
        else:
            delta = b @ a
        found[key] = found[key] + 1.5 * delta
    return found


def near(one: Any, other: Any, **options: float) -> None:
    for a, b in zip(one, other, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, **({"rtol": 1e-5, "atol": 1e-5} | options))


@pytest.mark.parametrize("call", [{}, {"need_weights": False}, {"average_attn_weights": False}, {"mask": True}])
@every
def test_forward_and_gradients_are_those_of_patched_weights(form, call):
    ours, plain, x = model(form), model(form), inputs(form)
    patch = apply(ours)
    if call.pop("mask", False):
        call = {
            "attn_mask": torch.ones(4, 4, dtype=torch.bool).triu(1),
            "key_padding_mask": torch.arange(4).expand(4, 4) == 3,
        }
    outs = []
    for run in (lambda: ours(*x, **call), lambda: functional_call(plain, weights(plain, ours), tuple(x), call)):
        torch.manual_seed(3)
        outs.append(run())
    near(*outs)
    wanted = [*x, *patch.trainable_parameters()]
    grads = [torch.autograd.grad(out[0].pow(2).sum(), wanted) for out in outs]
    near(*grads, rtol=1e-4)
    ours.eval(), plain.eval()
    with torch.no_grad():
        near(ours(*x, **call), functional_call(plain, weights(plain, ours), tuple(x), call))


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("form", ["fused", "batch first", "no bias", "extra keys"])
def test_as_peft_has_it(form, train):
    """But for the output's factors: PEFT 0.21 adds their product to the weight twice (lora/layer.py, `merge` of its
    MultiheadAttention and of the Linear in there), so they are zero here."""
    ours, theirs, x = model(form).train(train), model(form), inputs(form)
    apply(ours)
    ours.attn.out_proj_lora_B.data.zero_()
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=2, lora_alpha=3, target_modules=["attn"])).train(train)
    layer = theirs.base_model.model.attn
    out = layer.base_layer.out_proj
    mine = [getattr(ours.attn, f"{name}_lora_{ab}") for name in ("in_proj", "out_proj") for ab in "AB"]
    yours = [f["default"].weight for f in (layer.lora_A, layer.lora_B, out.lora_A, out.lora_B)]
    for one, other in zip(mine, yours, strict=True):
        other.data.copy_(one)
    y, z = ours(*x), theirs(*x)
    near(y, z)
    near(*(torch.autograd.grad(o[0].pow(2).sum(), f[:2]) for o, f in ((y, mine), (z, yours))), rtol=1e-4)


@pytest.mark.parametrize("parts", ["qv", "k", "qkv"])
@pytest.mark.parametrize("form", ["fused", "separate"])
def test_parts(form, parts):
    ours, plain, x = model(form), model(form), inputs(form)
    patch = apply(ours, f", parts=[{', '.join(f'{chr(34)}{p}{chr(34)}' for p in reversed(parts))}]")
    assert not any("out_proj" in key for key in patch.adapter_state_dict())
    near(ours(*x), functional_call(plain, weights(plain, ours, parts), tuple(x)))
    if form == "fused":
        assert ours.attn.in_proj_lora_A.shape == (2 * len(parts), 8)
        assert ours.attn.in_proj_lora_B.shape == (8 * len(parts), 2)


def test_out_alone():
    ours, plain, x = model("fused"), model("fused"), inputs("fused")
    assert list(apply(ours, ', parts=["out"]').adapter_state_dict()) == ["attn.out_proj_lora_A", "attn.out_proj_lora_B"]
    near(ours(*x), functional_call(plain, weights(plain, ours), tuple(x)))


@every
def test_nothing_changes_at_init_and_all_is_undone(form):
    made, x = model(form).eval(), [t.detach() for t in inputs(form)]
    made.requires_grad_(False)  # which kernel computes depends on it
    before, y = state(made), made(*x)
    patch = apply(made, trained=False)
    made.requires_grad_(False)
    near(made(*x), y, rtol=0, atol=0)
    assert not any(p.any() for key, p in patch.adapter_state_dict().items() if key.endswith("B"))
    randomise(patch)
    z = made(*x)
    assert not torch.equal(z[0], y[0])
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        near(other(*x), z, rtol=0, atol=0)
        graphpatch.patches(other)[0].revert()
        near(other(*x), y, rtol=0, atol=0)
    with patch.disabled():
        near(made(*x), y, rtol=0, atol=0)
    patch.revert()
    made.requires_grad_(False)
    assert state(made) == before


@pytest.mark.parametrize("parts", ["", ', parts=["q", "v", "out"]'])
@every
def test_merged_and_saved(form, parts, tmp_path):
    made, x = model(form).eval(), inputs(form)
    patch = apply(made, parts)
    before = {k: v.clone() for k, v in made.state_dict().items()}
    y = made(*x)
    graphpatch.save_adapter(patch, tmp_path)
    other = model(form).eval()
    graphpatch.load_adapter(other, tmp_path)
    near(other(*x), y, rtol=0, atol=0)
    patch.merge()
    near(made(*x), y)
    patch.unmerge()
    assert all(torch.equal(v, before[k]) for k, v in made.state_dict().items())


def test_named_adapters_add_up():
    made, plain, x = model("separate"), model("separate"), inputs("separate")
    for name in "ab":
        apply(made, adapter=name)
    for key, factor in made.named_parameters():
        if "lora" in key and key.endswith("B_b"):
            factor.data.neg_().mul_(0.5)
    plain.load_state_dict({k: v.detach() for k, v in weights(plain, made, tail="_a").items()})
    near(made(*x), functional_call(plain, weights(plain, made, tail="_b"), tuple(x)))


@every
def test_on_a_bf16_base(form):
    made, exact = model(form, torch.bfloat16).eval(), model(form, torch.bfloat16).double().eval()
    patch = apply(made)
    reference = apply(exact)
    for mine, yours in zip(patch.trainable_parameters(), reference.trainable_parameters(), strict=True):
        assert mine.dtype == torch.float32
        yours.data.copy_(mine)
    x = inputs(form, torch.bfloat16)
    y, z = made(*x)[0], exact(*(t.double() for t in x))[0]
    assert y.dtype == torch.bfloat16 and (y - z).abs().max() < 0.03 * z.abs().max()
    grads = torch.autograd.grad(y.sum(), patch.trainable_parameters())
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in grads)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_inside_the_encoder_with_its_fast_path(grad, padded):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    made = nn.TransformerEncoder(layer, 2).eval()
    plain = copy.deepcopy(made)
    patch = apply(made)
    for path in ("layers.0.self_attn", "layers.1.self_attn"):
        mine, bare = made.get_submodule(path), plain.get_submodule(path)
        bare.in_proj_weight.data += 1.5 * (mine.in_proj_lora_B @ mine.in_proj_lora_A).detach()
        bare.out_proj.weight.data += 1.5 * (mine.out_proj_lora_B @ mine.out_proj_lora_A).detach()
    x = torch.randn(3, 5, 8)
    mask = torch.arange(5).expand(3, 5) >= torch.tensor([[5], [3], [4]]) if padded else None
    with torch.set_grad_enabled(grad):
        y, z = made(x, src_key_padding_mask=mask), plain(x, src_key_padding_mask=mask)
    keep = slice(None) if mask is None else ~mask
    torch.testing.assert_close(y[keep], z[keep], rtol=1e-5, atol=1e-5)
    if not padded:
        assert patch.probe(x) == []


@pytest.mark.parametrize("target", [":MultiheadAttention", "linear1", "linear2"])
def test_a_padded_batch_in_eval_mode_has_gradients(target):
    """The frozen encoder alone would make a nested tensor of it, which no module with an adapter takes."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    made = nn.TransformerEncoder(layer, 2).eval()
    before = state(made)
    patch = graphpatch.apply(made, graphpatch.parse(f"patch {target} with lora(rank=2){FREEZE}"))
    randomise(patch)
    x, mask = torch.randn(3, 5, 8), torch.arange(5).expand(3, 5) >= torch.tensor([[5], [3], [4]])
    y = made(src=x, src_key_padding_mask=mask)
    grads = torch.autograd.grad(y[~mask].pow(2).sum(), patch.trainable_parameters())
    assert all(g.any() for g in grads) and not x.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(made(x, src_key_padding_mask=mask)[~mask], y[~mask])
    patch.revert()
    assert state(made) == before


def test_compiled_whole():
    made, x = model("fused"), inputs("fused")
    patch = apply(made)
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
    y, z = made(*x), compiled(*x)
    near(y, z)
    near(*(torch.autograd.grad(o[0].pow(2).sum(), patch.trainable_parameters()) for o in (y, z)))


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_each_part_starts_as_a_linear_of_its_own(init):
    made = nn.ModuleDict({"attn": nn.MultiheadAttention(64, 2)})
    apply(made, f', parts=["q", "v"], init="{init}"', trained=False)
    a = made["attn"].in_proj_lora_A
    assert abs(a.std().item() / ((1 / 64 / 3) ** 0.5 if init == "kaiming" else 0.5) - 1) < 0.15
    assert not made["attn"].in_proj_lora_B.any()


class Own(nn.MultiheadAttention):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize(
    ("code", "arguments", "said"),
    [
        ("GP410", ", dropout=0.1", "no input passes the factors"),
        ("GP410", ", dora=true", "no effect"),
        ("GP410", ", bias=true", "no effect"),
        ("GP410", ', init="pissa"', "no effect"),
        ("GP410", ', parts=["q"], layout=[["q", 24]]', "its parts are known"),
        ("GP459", ', parts=["gate"]', "q, k, v, out"),
    ],
)
def test_what_would_have_no_effect_is_refused(code, arguments, said):
    rule = f"patch :MultiheadAttention with lora(rank=2{arguments}){FREEZE}"
    assert said in refused(code, model("fused"), rule)


def test_subclasses_and_the_inner_linear_are_refused():
    made = nn.ModuleDict({"attn": Own(8, 2)})
    assert "may use its input otherwise" in refused("GP410", made, f"patch attn with lora(rank=2){FREEZE}")
    text = refused("GP503", model("fused"), f"patch out_proj with lora(rank=2){FREEZE}")
    assert "`:MultiheadAttention`" in text


def test_every_b_has_the_rate_of_b():
    made = model("fused")
    patch = apply(made, adapter="a")
    rates = {id(p): group["lr"] for group in graphpatch.lora_plus(patch, lr=1.0, ratio=4.0) for p in group["params"]}
    assert {name[-3:]: rates[id(p)] for name, p in made.named_parameters() if "lora" in name} == {
        "A_a": 1.0,
        "B_a": 4.0,
    }


def test_parametrised_weights_are_those_that_gain_something():
    made, x = model("fused").double(), [t.double() for t in inputs("fused")]
    weight_norm(made.attn, "in_proj_weight")
    spectral_norm(made.attn.out_proj, "weight")
    made.eval()
    plain = model("fused").double().eval()
    with torch.no_grad():
        plain.attn.in_proj_weight.copy_(made.attn.in_proj_weight)
        plain.attn.out_proj.weight.copy_(made.attn.out_proj.weight)
    apply(made)
    near(made(*x), functional_call(plain, weights(plain, made), tuple(x)))
