"""Weighted combinations of adapters, as PEFT makes them, and as new adapters in their own right."""

from __future__ import annotations

import math

import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import graphpatch
from graphpatch.rewrites.combining import METHODS
from tests.patch.common import patch, state
from tests.patch.test_adapters import IDS, fill, flags, lm, refusal

KINDS = {
    "linear": (lambda: nn.Linear(12, 10), lambda: torch.randn(3, 12)),
    "conv1d": (lambda: Conv1D(10, 12), lambda: torch.randn(3, 12)),
    "embedding": (lambda: nn.Embedding(11, 7), lambda: torch.arange(11)),
    "convolution": (lambda: nn.Conv2d(4, 6, 3), lambda: torch.randn(2, 4, 5, 5)),
}
WEIGHTS = {"math": 0.7, "code": -0.4}


def options(method: str) -> dict:
    found = METHODS[method]
    return {**({"rank": 2} if found.dense else {}), **({"density": 0.5} if found.prune else {})}


def built(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(KINDS[kind][0]()).eval()


def theirs(kind: str) -> peft.PeftModel:
    model = peft.get_peft_model(built(kind), peft.LoraConfig(r=3, lora_alpha=5, target_modules=["0"]), "math")
    model.add_adapter("code", peft.LoraConfig(r=3, lora_alpha=9, target_modules=["0"]))
    return model.eval()


def mine(kind: str, other: peft.PeftModel) -> nn.Module:
    model, layer = built(kind), other.base_model.model[0]
    for seed, (name, alpha) in enumerate({"math": 5, "code": 9}.items()):
        handle = fill(patch(model, f"patch ^0 with lora(rank=3, alpha={alpha})", adapter=name), seed)
        for key, tensor in handle.adapter_state_dict().items():
            factor = "lora_A" if "lora_A" in key else "lora_B"
            held = getattr(layer, factor)
            if name in held:
                held[name].weight.data.copy_(tensor)
            else:
                getattr(layer, factor.replace("lora", "lora_embedding"))[name].data.copy_(tensor)
    return model


def with_masks(monkeypatch, call):
    """Draw what DARE draws from a generator of our own, since PEFT draws initial values in between."""
    generator, real = torch.Generator().manual_seed(7), torch.bernoulli
    with monkeypatch.context() as patched:
        patched.setattr(torch, "bernoulli", lambda chance, generator=None, g=generator: real(chance, generator=g))
        return call()


CASES = [(kind, method) for kind in KINDS for method in METHODS]
# There PEFT draws a mask of the transposed product: the same distribution, other values.
DRAWN = [(kind, method) for kind in ("embedding", "conv1d") for method in ("dare_linear_svd", "dare_ties_svd")]


@pytest.mark.parametrize(("kind", "method"), [case for case in CASES if case not in DRAWN])
def test_it_is_what_peft_makes_of_them(kind, method, monkeypatch):
    other = theirs(kind)
    model = mine(kind, other)
    given = options(method)
    with_masks(monkeypatch, lambda: graphpatch.combine(model, WEIGHTS, "both", method=method, **given))
    with_masks(
        monkeypatch,
        lambda: other.base_model.add_weighted_adapter(
            list(WEIGHTS),
            list(WEIGHTS.values()),
            "both",
            combination_type=method,
            svd_rank=given.get("rank"),
            density=given.get("density"),
        ),
    )
    graphpatch.adapters(model).activate("both")
    other.base_model.set_adapter("both")
    x = KINDS[kind][1]()
    torch.testing.assert_close(model(x), other(x), rtol=1e-4, atol=1e-4)


def test_cat_is_the_sum_of_ranks_and_exact_where_modules_and_ranks_differ():
    model = lm()
    fill(patch(model, "patch {q,v}_proj with lora(rank=2, alpha=6)", adapter="math"), 0)
    fill(patch(model, "patch {v,o}_proj with lora(rank=3)\npatch embed_tokens with lora(rank=2)", adapter="code"), 1)
    adapters = graphpatch.adapters(model)
    adapters.weights(WEIGHTS)
    expected, before = model(IDS), flags(model)
    both = graphpatch.combine(model, WEIGHTS, "both")
    assert torch.equal(model(IDS), expected)  # off until it is activated
    assert adapters.names == ("math", "code", "both") and adapters.active == ("math", "code")
    assert {name: on for name, on in flags(model).items() if name in before} == before
    assert all(p.requires_grad for n, p in model.named_parameters() if n in both.adapter_state_dict())
    adapters.activate("both")
    torch.testing.assert_close(model(IDS), expected)
    shapes = {key: tuple(t.shape) for key, t in both.adapter_state_dict().items()}
    assert shapes["model.layers.0.self_attn.q_proj.lora_A_both"] == (2, 16)
    assert shapes["model.layers.0.self_attn.v_proj.lora_A_both"] == (5, 16)
    assert shapes["model.layers.0.self_attn.o_proj.lora_A_both"] == (3, 16)
    adapters.delete("both")
    assert flags(model) == before


def test_svd_of_full_rank_is_exact_and_less_is_the_nearest():
    model = lm()
    for at, name in enumerate(WEIGHTS):
        fill(patch(model, f"patch q_proj with lora(rank={2 + at})", adapter=name), at)
    adapters = graphpatch.adapters(model)
    adapters.weights(WEIGHTS)
    expected = model(IDS)
    layer = model.model.layers[0].self_attn.q_proj
    whole = sum(
        w * getattr(layer, f"lora_B_{name}").detach() @ getattr(layer, f"lora_A_{name}").detach()
        for name, w in WEIGHTS.items()
    )
    graphpatch.combine(model, WEIGHTS, "five", method="svd", rank=5)
    graphpatch.combine(model, WEIGHTS, "two", method="svd", rank=2)
    graphpatch.combine(model, WEIGHTS, "more", method="svd", rank=20)
    adapters.weights(dict.fromkeys(WEIGHTS, 1.0))
    for name in "five", "more":
        adapters.activate(name)
        torch.testing.assert_close(model(IDS), expected, rtol=1e-4, atol=1e-5)
    u, s, v = torch.linalg.svd(whole)
    torch.testing.assert_close(layer.lora_B_two.detach() @ layer.lora_A_two.detach(), u[:, :2] * s[:2] @ v[:2])


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_groups_of_a_convolution_keep_their_share_of_the_rank(kind):
    torch.manual_seed(0)
    model, x = nn.Sequential(kind(4, 6, 3, groups=2)).eval(), torch.randn(2, 4, 5, 5)
    for at, name in enumerate(WEIGHTS):
        fill(patch(model, f"patch ^0 with lora(rank={2 + 2 * at}, alpha=3)", adapter=name), at)
    adapters = graphpatch.adapters(model)
    adapters.weights(WEIGHTS)
    expected = model(x)
    for method, given in ("cat", {}), ("svd", {"rank": 6}):
        both = graphpatch.combine(model, WEIGHTS, "both", method=method, **given)
        adapters.activate("both")
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
        both.revert()
    assert "no multiple" in refusal("GP525", lambda: graphpatch.combine(model, WEIGHTS, "x", method="svd", rank=3))


def test_pissa_is_combined_by_what_it_has_learnt():
    model = lm()
    for at, name in enumerate(WEIGHTS):
        fill(patch(model, f'patch q_proj with lora(rank={2 + at}, alpha=4, init="pissa")', adapter=name), at)
    adapters = graphpatch.adapters(model)
    adapters.weights(WEIGHTS)
    expected = model(IDS)
    both = graphpatch.combine(model, WEIGHTS, "both")
    adapters.activate("both")
    torch.testing.assert_close(model(IDS), expected, rtol=1e-4, atol=1e-5)
    assert set(both.adapter_state_dict()) == {
        f"model.layers.{at}.self_attn.q_proj.lora_{f}_both" for at in (0, 1) for f in "AB"
    }


SPECIAL = {
    "parts": (
        lambda: nn.Sequential(nn.Linear(6, 12)),
        'patch ^0 with lora(rank={rank}, parts=["q", "v"], layout=[["q", 2], ["k", 1], ["v", 3]], groups=2)',
        torch.randn(2, 3, 6),
    ),
    "tied": (
        lambda: tied(nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9, bias=False))),
        "patch ^{{0,2}} with lora(rank={rank}, tied=true)",
        torch.arange(8).view(2, 4),
    ),
    "the head first": (
        lambda: Backwards(),
        "patch head | embed with lora(rank={rank}, tied=true)",
        torch.arange(8).view(2, 4),
    ),
}


def tied(model: nn.Sequential) -> nn.Sequential:
    model[2].weight = model[0].weight
    return model


class Backwards(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 9, bias=False)
        self.embed = nn.Embedding(9, 6)
        self.embed.weight = self.head.weight

    def forward(self, ids):
        return self.head(self.embed(ids))


@pytest.mark.parametrize("kind", SPECIAL)
def test_parts_of_a_linear_and_tied_weights(kind, tmp_path):
    build, text, x = SPECIAL[kind]
    torch.manual_seed(0)
    model = build().eval()
    for at, name in enumerate(WEIGHTS):
        handle = fill(patch(model, text.format(rank=2 + at), adapter=name), at)
        if kind == "parts":
            graphpatch.save_adapter(handle, tmp_path / name)
    adapters = graphpatch.adapters(model)
    alone = {}
    for name in WEIGHTS:
        adapters.activate(name)
        alone[name] = model(x)
    with adapters.per_sample(["math", "code"]):
        torch.testing.assert_close(model(x), torch.stack([alone["math"][0], alone["code"][1]]))
    adapters.activate(*WEIGHTS)
    adapters.weights(WEIGHTS)
    expected = model(x)
    for method, given in ("cat", {}), ("svd", {"rank": 6}):
        both = graphpatch.combine(model, WEIGHTS, "both", method=method, **given)
        adapters.activate("both")
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
        both.revert()
    if kind == "parts":
        slot = patch(model, text.format(rank=5), adapter="slot")
        graphpatch.load_weights(slot, tmp_path / "code", fit=True)
        adapters.activate("slot")
        torch.testing.assert_close(model(x), alone["code"])


@pytest.mark.parametrize("widths", [{}, {"kdim": 6, "vdim": 7}], ids=["in one", "apart"])
@pytest.mark.parametrize("parts", ["", ', parts=["q", "v"]', ', parts=["out", "k"]'])
def test_attention_is_combined_weight_by_weight(widths, parts):
    torch.manual_seed(0)
    model = nn.Sequential(nn.MultiheadAttention(8, 2, batch_first=True, **widths)).eval()
    x, k, v = (torch.randn(2, 5, n) for n in (8, widths.get("kdim", 8), widths.get("vdim", 8)))
    bare = model[0](x, k, v)[0]
    for at, name in enumerate(WEIGHTS):
        fill(patch(model, f"patch ^0 with lora(rank={2 + at}, alpha=3{parts})", adapter=name), at)
    adapters = graphpatch.adapters(model)
    adapters.activate(*WEIGHTS)
    adapters.weights(WEIGHTS)
    expected, _ = model[0](x, k, v)
    for method, given in ("cat", {}), ("svd", {"rank": 5}):
        both = graphpatch.combine(model, WEIGHTS, "both", method=method, **given)
        adapters.activate("both")
        torch.testing.assert_close(model[0](x, k, v)[0], expected, rtol=1e-4, atol=1e-5)
        both.revert()
    adapters.activate()
    assert torch.equal(model[0](x, k, v)[0], bare) and not torch.allclose(expected, bare)


def test_stacked_experts_are_combined_one_by_one():
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = MixtralForCausalLM(
        MixtralConfig(**size, num_key_value_heads=2, vocab_size=32, num_local_experts=3, num_experts_per_tok=2)
    ).eval()
    for at, name in enumerate(WEIGHTS):
        text = f"patch experts.{{gate_up,down}}_proj | q_proj with lora(rank={2 + at}, alpha=3)"
        fill(patch(model, text, adapter=name), at)
    adapters = graphpatch.adapters(model)
    adapters.weights(WEIGHTS)
    expected = model(IDS).logits
    for method, given in ("cat", {}), ("svd", {"rank": 5}):
        both = graphpatch.combine(model, WEIGHTS, "both", method=method, **given)
        adapters.activate("both")
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-5)
        both.revert()
    refusal("GP547", lambda: adapters.per_sample(["math", "code"]).__enter__())
    adapters.activate("math")
    alone = model(IDS).logits
    with adapters.per_sample(["math", "math"]):
        assert torch.equal(model(IDS).logits, alone)


def test_dare_is_right_in_expectation_and_a_seed_repeats_it():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3))
    fill(patch(model, "patch ^0 with lora(rank=2)", adapter="math"), 0)
    layer, total, draws = model[0], 0, 200
    exact = layer.lora_B_math.detach() @ layer.lora_A_math.detach()
    kept = []
    for seed in range(draws):
        handle = graphpatch.combine(
            model, {"math": 1.0}, "some", method="dare_linear_svd", density=0.5, seed=seed, rank=3
        )
        delta = layer.lora_B_some.detach() @ layer.lora_A_some.detach()
        kept.append((delta.abs() > 1e-6).float().mean().item())
        total = total + delta / draws
        handle.revert()
    assert abs(sum(kept) / draws - 0.5) < 0.04
    deviation = exact.abs() / math.sqrt(draws)  # of one value: 0 or twice itself
    assert ((total - exact).abs() < 4.5 * deviation + 1e-6).all()
    state_before = torch.random.get_rng_state()
    one, two = (graphpatch.combine(model, {"math": 1.0}, n, method="dare_linear", density=0.5, seed=3) for n in "xy")
    assert torch.equal(torch.random.get_rng_state(), state_before)
    for a, b in zip(one.adapter_state_dict().values(), two.adapter_state_dict().values()):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_saved_and_loaded_as_any_adapter(tmp_path, dtype):
    model = lm().to(dtype)
    for at, name in enumerate((None, "code")):
        fill(patch(model, "patch {q,v}_proj | layers[1].**.up_proj with lora(rank=2)", adapter=name), at)
    both = graphpatch.combine(model, {None: 0.5, "code": 2}, "both", method="ties", density=0.4)
    adapters = graphpatch.adapters(model)
    adapters.activate("both")
    expected = model(IDS)
    graphpatch.save_adapter(both, tmp_path / "both")
    fresh = lm().to(dtype)
    loaded = graphpatch.load_adapter(fresh, tmp_path / "both")
    assert torch.equal(fresh(IDS), expected)
    assert not fresh.lm_head.weight.requires_grad and loaded.trainable_parameters()
    renamed = graphpatch.load_adapter(lm().to(dtype), tmp_path / "both", adapter="third")
    assert all(key.endswith("_third") for key in renamed.adapter_state_dict())
    graphpatch.to_peft(both, tmp_path / "peft")
    imported = lm().to(dtype)
    graphpatch.load_peft(imported, tmp_path / "peft")
    torch.testing.assert_close(imported(IDS), expected)


def test_what_is_refused():
    model = lm()
    fill(patch(model, "patch {q,v}_proj with lora(rank=2)", adapter="math"), 0)
    fill(patch(model, "patch v_proj with lora(rank=3)", adapter="code"), 1)
    patch(model, "patch q_proj with lora(rank=2, dora=true)", adapter="dora")
    patch(model, "patch q_proj with lora(rank=2, bias=true)", adapter="biased")
    before = state(model)

    def combine(code, weights=WEIGHTS, name="both", **options):
        return refusal(code, lambda: graphpatch.combine(model, weights, name, **options))

    assert "of 2, 3" in combine("GP526", method="linear") and "v_proj" in combine("GP526", method="linear")
    assert "did you mean `ties`?" in combine("GP525", method="tie", density=0.5)
    for given in (
        {"density": 0.5},
        {"method": "linear", "rank": 2},
        {"method": "svd", "density": 0.5},
        {"method": "svd", "rank": 0},
        {"method": "ties"},
        {"method": "ties", "density": 0},
        {"method": "ties", "density": 1.5},
        {"method": "ties", "density": "0.5"},
        {"method": "ties", "density": 0.5, "seed": 1},
        {"method": "ties", "density": 0.5, "majority": "most"},
        {"method": "dare_linear", "density": 0.5, "majority": "total"},
        {"method": "dare_ties", "density": 0.5, "seed": "x"},
        {"method": None},
        {"weights": {}},
        {"weights": ["math"]},
        {"name": None},
    ):
        combine("GP525", **given)
    combine("GP528", name="math")
    combine("GP545", weights={"math": 1, "mth": 1})
    combine("GP546", weights={"math": float("nan")})
    assert "DoRA" in combine("GP527", weights={"math": 1, "dora": 1})
    assert "bias" in combine("GP527", weights={"math": 1, "biased": 1})
    with pytest.raises(graphpatch.PlanError) as caught:
        graphpatch.combine(model, WEIGHTS, "not a name")
    assert caught.value.code == "GP423"
    assert state(model) == before


def test_a_failure_half_way_leaves_the_model_as_it_was(monkeypatch):
    import graphpatch.patch.combine as module

    model = lm()
    fill(patch(model, "patch q_proj with lora(rank=2)", adapter="math"), 0)
    before = state(model)
    monkeypatch.setattr(module, "_fill", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        graphpatch.combine(model, {"math": 1}, "both")
    assert state(model) == before
