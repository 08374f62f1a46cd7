"""LoRA on stacked experts: against the module's own forward with patched weights, and against PEFT in whole models."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation
from transformers.models.aria.modeling_aria import AriaExperts
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.jetmoe.modeling_jetmoe import JetMoeParallelExperts
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.step3p7.modeling_step3p7 import Step3p7Experts

import graphpatch
from graphpatch.rewrites import grouped

from ..patch.common import randomise, refused, state

CONFIG = {
    **dict.fromkeys(["num_local_experts", "n_routed_experts", "moe_num_experts", "num_experts"], 5),
    **dict.fromkeys(["hidden_size", "moe_hidden_size"], 8),
    **dict.fromkeys(["intermediate_size", "moe_intermediate_size"], 12),
    **dict.fromkeys(["hidden_act", "mlp_hidden_act"], "silu"),
    "moe_latent_size": None,
    "post_norm_eps": 1e-6,
    "swiglu_limit": 7.0,
    "swiglu_alpha": 1.7,
    "_experts_implementation": "eager",
}
TOKENS, TOP, RANK = 7, 2, 3


class Kind(NamedTuple):
    make: Callable[[], nn.Module]
    stacks: tuple[str, ...] = ("gate_up_proj", "down_proj")
    transposed: bool = False
    call: Callable[[Tensor], tuple[Any, ...]] = lambda x: routed(x)
    rows: int = TOKENS

    def model(self, dtype: torch.dtype = torch.float32) -> nn.Sequential:
        torch.manual_seed(0)
        module = self.make()
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.5)
        # Under a name, so that the parameters have the paths that rules say.
        model = nn.Sequential()
        model.add_module("experts", module)
        return model.to(dtype)

    def input(self, dtype: torch.dtype = torch.float32) -> Tensor:
        torch.manual_seed(2)
        return torch.randn(self.rows, 8, dtype=dtype, requires_grad=True)

    def delta(self, a: Tensor, b: Tensor) -> Tensor:
        return (b @ a).mT if self.transposed else b @ a


def routed(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Expert 3 gets nothing, and a token may come to one expert only once."""
    ids = torch.tensor([[0, 1], [4, 0], [2, 1], [1, 4], [0, 2], [4, 2], [1, 0]])
    weights = torch.linspace(0.1, 0.9, TOKENS * TOP, dtype=x.dtype).view(TOKENS, TOP)
    return x, ids, weights


def of(cls: type) -> Callable[[], nn.Module]:
    return lambda: cls(SimpleNamespace(**CONFIG))


KINDS = {
    "Mixtral": Kind(of(MixtralExperts)),
    "gpt-oss": Kind(of(GptOssExperts), transposed=True),
    "Aria": Kind(of(AriaExperts), transposed=True),
    "Nemotron, no gate": Kind(of(NemotronHExperts), ("up_proj", "down_proj")),
    "Muse Spark, normed after": Kind(of(MuseSparkExperts)),
    "DeepSeek V4, a gate of its own": Kind(of(DeepseekV4Experts)),
    "Step 3, not dispatched": Kind(lambda: Step3p7Experts(SimpleNamespace(**CONFIG), swiglu_limit=1.0)),
    "Llama 4": Kind(of(Llama4TextExperts), transposed=True, call=lambda x: (x,), rows=10),
    "JetMoE": Kind(lambda: JetMoeParallelExperts(5, 8, 12), ("weight",), call=lambda x: (x, [1, 3, 0, 2, 1]), rows=7),
}
every = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())


def apply(model: nn.Module, kind: Kind, arguments: str = "", trained: bool = True) -> graphpatch.Patch:
    targets = " | ".join(f"experts.{stack}" for stack in kind.stacks)
    rules = f"patch {targets} with lora(rank={RANK}, alpha={2 * RANK}{arguments})\nfreeze ** except @new"
    patch = graphpatch.apply(model, graphpatch.parse(rules))
    if trained:
        randomise(patch)
    return patch


def factors(model: nn.Module, kind: Kind, adapter: str = "") -> list[Tensor]:
    names = [f"{stack}_lora_{ab}{adapter}" for stack in kind.stacks for ab in "AB"]
    return [getattr(model.get_submodule("experts"), name) for name in names]


def merged_weights(kind: Kind, plain: nn.Module, found: list[Tensor], scale: float = 2.0) -> dict[str, Tensor]:
    weights = dict(plain.named_parameters())
    for stack, a, b in zip(kind.stacks, found[::2], found[1::2], strict=True):
        weights[f"experts.{stack}"] = weights[f"experts.{stack}"] + scale * kind.delta(a, b)
    return weights


def run(kind: Kind, model: nn.Module, x: Tensor, weights: dict[str, Tensor] | None = None) -> Tensor:
    experts = model.get_submodule("experts")
    if weights is None:
        return experts(*kind.call(x))
    return functional_call(experts, {k.removeprefix("experts."): v for k, v in weights.items()}, kind.call(x))


@pytest.mark.parametrize("only", [0, 1, None])
@every
def test_forward_and_gradients_are_those_of_patched_weights(kind, only):
    """Also of one stack alone, of the input, of the routing weights, and of the base where it trains along."""
    chosen = kind if only is None else kind._replace(stacks=kind.stacks[only : only + 1] or kind.stacks)
    ours, plain = chosen.model(), chosen.model()
    apply(ours, chosen)
    ours.requires_grad_(True)
    x, found = chosen.input(), factors(ours, chosen)
    y, z = run(chosen, ours, x), run(chosen, plain, x, merged_weights(chosen, plain, found))
    torch.testing.assert_close(y, z, rtol=1e-5, atol=1e-5)
    weights = torch.randn_like(y)
    names = [name for name, _ in plain.named_parameters()]
    mine, yours = (
        torch.autograd.grad((out * weights).sum(), [x, *found, *map(model.get_parameter, names)])
        for out, model in ((y, ours), (z, plain))
    )
    for one, other in zip(mine, yours, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(run(chosen, ours, x), z, rtol=1e-5, atol=1e-5)


def test_gradients_reach_the_router():
    kind = KINDS["gpt-oss"]
    ours, plain, x = kind.model(), kind.model(), kind.input()
    apply(ours, kind)
    _, ids, weights = routed(x)
    grads = []
    for out in (
        lambda w: ours.experts(x, ids, w),
        lambda w: run(
            kind._replace(call=lambda x: (x, ids, w)), plain, x, merged_weights(kind, plain, factors(ours, kind))
        ),
    ):
        w = weights.clone().requires_grad_()
        grads.append(torch.autograd.grad(out(w).pow(2).sum(), w)[0])
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


@every
def test_merged_the_stacks_compute_the_same(kind):
    model, x = kind.model(), kind.input()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    patch = apply(model, kind)
    after = run(kind, model, x)
    patch.merge()
    torch.testing.assert_close(run(kind, model, x), after, rtol=1e-5, atol=1e-5)
    bare = kind.model()
    bare.load_state_dict({k: v for k, v in model.state_dict().items() if k in before})
    torch.testing.assert_close(run(kind, bare, x), after, rtol=1e-5, atol=1e-5)
    patch.unmerge()
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())


@every
def test_nothing_changes_at_init_and_all_is_undone(kind):
    model, x = kind.model(), kind.input()
    before, y = state(model), run(kind, model, x)
    patch = apply(model, kind, trained=False)
    torch.testing.assert_close(run(kind, model, x), y, rtol=1e-6, atol=1e-6)
    names = [f"experts.{stack}_lora_{ab}" for stack in kind.stacks for ab in "AB"]
    assert sorted(patch.adapter_state_dict()) == sorted(names)
    a, b = factors(model, kind)[:2]
    out, in_ = kind.delta(a, b).shape[1:][:: -1 if kind.transposed else 1]
    assert a.shape == (5, RANK, in_) and b.shape == (5, out, RANK)
    assert a.abs().max() <= in_**-0.5 and a.std() > 0.4 * in_**-0.5 and not b.any()
    assert all(f"{stack}: lora(rank=3" in repr(model) for stack in kind.stacks)
    randomise(patch)
    changed = run(kind, model, x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(kind, other, x), changed)
        graphpatch.patches(other)[0].revert()
        assert torch.equal(run(kind, other, x), y)
    with patch.disabled():
        assert torch.equal(run(kind, model, x), y)
    assert torch.equal(run(kind, model, x), changed) and not torch.equal(changed, y)
    patch.revert()
    assert state(model) == before


@every
def test_on_a_bf16_base_with_float32_factors(kind):
    """Within 3 % of the same in float64."""
    model, exact = kind.model(torch.bfloat16), kind.model(torch.bfloat16).double()
    apply(model, kind)
    apply(exact, kind)
    for to, source in zip(factors(exact, kind), factors(model, kind)):
        assert source.dtype == torch.float32
        to.data.copy_(source.bfloat16())
    x = kind.input(torch.bfloat16)
    y, z = run(kind, model, x), run(kind, exact, x.double())
    assert y.dtype == torch.bfloat16 and (y.double() - z).abs().max() < 0.03 * z.abs().max()
    grads = torch.autograd.grad(y.sum(), factors(model, kind))
    for grad, wanted in zip(grads, torch.autograd.grad(z.sum(), factors(exact, kind)), strict=True):
        assert grad.dtype == torch.float32
        assert (grad - wanted).abs().max() < 0.05 * wanted.abs().max()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", [KINDS["gpt-oss"], KINDS["Llama 4"], KINDS["JetMoE"]])
def test_checkpointed(kind, reentrant):
    model, x = kind.model(), kind.input()
    apply(model, kind, ", dropout=0.3")
    wanted = [x, *factors(model, kind)]
    torch.manual_seed(5)
    plain = torch.autograd.grad(run(kind, model, x).pow(2).sum(), wanted)
    torch.manual_seed(5)
    checkpoint(lambda x: run(kind, model, x), x, use_reentrant=reentrant).pow(2).sum().backward()
    for one, other in zip(plain, wanted, strict=True):
        torch.testing.assert_close(other.grad, one)


@every
def test_dropout_acts_on_what_the_adapter_sees_and_in_training_alone(kind):
    model, x = kind.model(), kind.input()
    apply(model, kind, ", dropout=0.5")
    apply(same := kind.model(), kind)
    trained = torch.stack([run(kind, model, x) for _ in range(2)])
    assert not torch.equal(*trained)
    torch.testing.assert_close(run(kind, model.eval(), x), run(kind, same, x))
    if len(kind.stacks) == 1:  # what is linear has the mean that it has without
        model.train()
        mean = torch.stack([run(kind, model, x) for _ in range(400)]).mean(0)
        assert (mean - run(kind, same, x)).abs().max() < 0.4


@every
def test_named_adapters_add_up(kind):
    model, plain, x = kind.model(), kind.model(), kind.input()
    for name in "ab":
        targets = " | ".join(f"experts.{stack}" for stack in kind.stacks)
        text = f"patch {targets} with lora(rank={RANK})\nfreeze ** except @new"
        randomise(graphpatch.apply(model, graphpatch.parse(text), adapter=name))
    for parameter in factors(model, kind, "_b"):
        parameter.data.neg_().mul_(0.5)
    weights = merged_weights(kind, plain, factors(model, kind, "_a"), 1)
    plain.load_state_dict({k: v.detach() for k, v in weights.items()})
    weights = merged_weights(kind, plain, factors(model, kind, "_b"), 1)
    torch.testing.assert_close(run(kind, model, x), run(kind, plain, x, weights), rtol=1e-5, atol=1e-5)


@every
def test_compiled(kind):
    """Whole, where the experts themselves are."""
    model, x = kind.model(), kind.input()
    apply(model, kind)
    wanted = [x, *factors(model, kind)]
    y = run(kind, model, x)
    compiled = torch.compile(model.get_submodule("experts"), backend="aot_eager", fullgraph=kind.stacks != ("weight",))
    z = compiled(*kind.call(x))
    torch.testing.assert_close(y, z)
    for a, b in zip(*(torch.autograd.grad(out.pow(2).sum(), wanted) for out in (y, z)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("kind", [k for k in KINDS.values() if k.call is not None and k.rows == TOKENS][:6])
def test_whichever_implementation_is_set(kind, implementation):
    model, plain, x = kind.model(), kind.model(), kind.input()
    apply(model, kind)
    for m in (model, plain):
        m.experts.config._experts_implementation = implementation
    weights = merged_weights(kind, plain, factors(model, kind))
    torch.testing.assert_close(run(kind, model, x), run(kind, plain, x, weights), rtol=1e-5, atol=1e-5)


def test_an_implementation_of_somebody_is_not_ignored():
    kind = KINDS["Mixtral"]
    model, x = kind.model(), kind.input()
    patch = apply(model, kind)
    ALL_EXPERTS_FUNCTIONS.register("mine", lambda self, x, ids, weights: x)
    model.experts.config._experts_implementation = "mine"
    with pytest.raises(graphpatch.Error) as caught:
        run(kind, model, x)
    assert caught.value.code == "GP524" and '"mine"' in str(caught.value)
    with patch.disabled():
        assert torch.equal(run(kind, model, x), x)


def test_what_other_ranks_compute_stays_zero():
    """Under expert parallelism the router sends away what is not here, with a number beyond the last."""
    kind = KINDS["gpt-oss"]
    model, plain, x = kind.model(), kind.model(), kind.input()
    apply(model, kind)
    _, ids, weights = routed(x)
    ids, weights = ids.masked_fill(ids == 1, 5), weights.masked_fill(ids == 1, 0.0)
    for m in (model, plain):
        m.experts.config._experts_implementation, m.experts._is_expert_parallel = "grouped_mm", True
    away = kind._replace(call=lambda x: (x, ids, weights))
    z = run(away, plain, x, merged_weights(kind, plain, factors(model, kind)))
    y = run(away, model, x)
    torch.testing.assert_close(y, z, rtol=1e-5, atol=1e-5)
    grads = [torch.autograd.grad(out.sum(), [x, *factors(model, kind)]) for out in (y, z)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_nothing_as_large_as_a_stack_is_kept():
    model, x = KINDS["Mixtral"].model(), KINDS["Mixtral"].input()
    apply(model, KINDS["Mixtral"])
    parameters, kept = {p.data_ptr() for p in model.parameters()}, []

    def keep(tensor: Tensor) -> Tensor:
        kept.extend([] if tensor.data_ptr() in parameters else [tensor.shape])
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run(KINDS["Mixtral"], model, x)
    assert kept and all(len(shape) < 3 for shape in kept)


# ── refusals ──


class Own(MixtralExperts):
    def forward(self, hidden_states, top_k_index, top_k_weights):
        return hidden_states


@pytest.mark.parametrize(
    ("code", "make", "target", "said"),
    [
        ("GP523", of(Own), "gate_up_proj", "a forward of its own"),
        ("GP456", of(GptOssExperts), "gate_up_proj_bias", "gate_up_proj and down_proj"),
        ("GP456", lambda: nn.Linear(4, 4), "weight", "end the selector at the module"),
        ("GP456", lambda: nn.MultiheadAttention(8, 2), "in_proj_weight", "whose forward it knows"),
        (
            "GP456",
            lambda: LongcatFlashExperts(SimpleNamespace(**CONFIG, expert_ffn_hidden_size=6, zero_expert_num=1)),
            "gate_up_proj",
            "whose forward it knows",
        ),
    ],
)
def test_what_is_unknown_is_refused(code, make, target, said):
    model = Kind(make).model()
    assert said in refused(code, model, f"patch experts.{target} with lora(rank=2)\nfreeze ** except @new")


def test_the_experts_as_a_module_are_refused():
    text = refused("GP410", KINDS["Mixtral"].model(), "patch experts with lora(rank=2)\nfreeze ** except @new")
    assert "patch ^experts.gate_up_proj | ^experts.down_proj" in text


# ── whole models, against PEFT ──

BASE = {
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 32,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Mixtral": ("Mixtral", {"num_local_experts": 4}),
    "Qwen3Moe": ("Qwen3Moe", {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 8}),
    "DeepseekV3": (
        "DeepseekV3",
        {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "n_group": 2, "topk_group": 1}
        | {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
        | {"first_k_dense_replace": 1, "num_key_value_heads": 4},
    ),
    "GptOss": ("GptOss", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}),
}


def whole(name: str) -> nn.Module:
    family, more = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**BASE, **more})
    model: nn.Module = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        if not parameter.any():  # the biases of gpt-oss
            nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_whole_models_are_as_peft_has_them(name, rslora):
    """Logits, gradients and merged weights, with the same factors: PEFT has the experts of A in its rows, and those of
    B in its columns, the fastest."""
    ours, theirs = whole(name), whole(name)
    rules = f"""patch experts.gate_up_proj | experts.down_proj with lora(rank=3, alpha=5, use_rslora={str(rslora).lower()})
    freeze ** except @new"""
    patch = graphpatch.apply(ours, graphpatch.parse(rules))
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        use_rslora=rslora,
        target_modules=[],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )
    theirs = peft.get_peft_model(theirs, config)
    randomise(patch)
    pairs: list[tuple[nn.Parameter, nn.Parameter, Callable[[Tensor], Tensor]]] = []
    for module in theirs.modules():
        if type(module).__name__ == "ParamWrapper":
            path = next(n for n, m in theirs.named_modules() if m is module.get_base_layer())
            path = path.removeprefix("base_model.model.").replace(".base_layer", "")
            key = f"{path}.{module.parameter_name}"
            a, b = ours.get_parameter(key + "_lora_A"), ours.get_parameter(key + "_lora_B")
            # ours (experts, rank, in) -> theirs (experts * rank, in); (experts, out, rank) -> (out, rank * experts)
            pairs.append((a, module.lora_A["default"].weight, lambda t: t.reshape(-1, t.shape[2])))
            pairs.append((b, module.lora_B["default"].weight, lambda t: t.permute(1, 2, 0).reshape(t.shape[1], -1)))
    assert len(pairs) == 4 * sum("gate_up_proj_lora_A" in k for k in patch.adapter_state_dict())
    for mine, yours, to in pairs:
        yours.data.copy_(to(mine))
    ids = torch.arange(14).view(2, 7)
    y, z = ours(ids).logits, theirs(ids).logits
    torch.testing.assert_close(y, z, rtol=1e-5, atol=1e-5)
    mine = torch.autograd.grad(y.pow(2).sum(), [p for p, _, _ in pairs])
    yours = torch.autograd.grad(z.pow(2).sum(), [p for _, p, _ in pairs])
    for one, other, (_, _, to) in zip(mine, yours, pairs, strict=True):
        torch.testing.assert_close(to(one), other, rtol=1e-4, atol=1e-5)


# ── the products ──


@pytest.mark.parametrize("ends", [[2, 2, 5], [0, 0, 0], [0, 4, 6], [6, 6, 6]])
def test_grouped_products_and_their_derivatives(ends):
    x, w = torch.randn(6, 3, dtype=torch.float64), torch.randn(3, 3, 4, dtype=torch.float64)
    x.requires_grad_(), w.requires_grad_()
    at = torch.tensor(ends)
    y = grouped.grouped_mm(x, w, at)
    for row in range(6):
        group = next((i for i, end in enumerate(ends) if row < end), None)
        torch.testing.assert_close(y[row], y.new_zeros(4) if group is None else x[row] @ w[group])
    assert torch.autograd.gradcheck(lambda x, w: grouped.grouped_mm(x, w, at), (x, w))
    assert torch.autograd.gradgradcheck(lambda x, w: grouped.grouped_mm(x, w, at), (x, w))
    torch.library.opcheck(grouped.grouped_mm, (x, w, at))
    torch.library.opcheck(grouped.grouped_outer, (x, torch.randn(6, 5, dtype=torch.float64), at))


def test_the_kernel_of_pytorch_gives_the_same(monkeypatch):
    """It runs on GPUs alone, where the loop is slow; its use is the same on a CPU."""
    x, w, ends = torch.randn(9, 16).bfloat16(), torch.randn(3, 16, 8).bfloat16(), torch.tensor([2, 2, 7])
    plain = grouped.grouped_mm(x, w, ends)
    monkeypatch.setattr(grouped, "has_kernel", lambda x, weight: True)
    torch.testing.assert_close(grouped.grouped_mm(x, w, ends), plain, rtol=2e-2, atol=2e-2)
    assert not grouped.grouped_mm(x, w, ends)[7:].any()


def test_a_class_of_ones_own_that_transformers_dispatches():
    @use_experts_implementation(is_transposed=True, has_bias=False)
    class Mine(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.empty(5, 8, 12))
            self.down_proj = nn.Parameter(torch.empty(5, 6, 8))
            self.act_fn = nn.GELU()

        def forward(self, hidden_states, top_k_index, top_k_weights):
            out = torch.zeros_like(hidden_states)
            for token, (ids, weights) in enumerate(zip(top_k_index.tolist(), top_k_weights)):
                for at, weight in zip(ids, weights):
                    gate, up = (hidden_states[token] @ self.gate_up_proj[at]).chunk(2)
                    out[token] += weight * ((self.act_fn(gate) * up) @ self.down_proj[at])
            return out

    kind = Kind(of(Mine), transposed=True)
    model, plain, x = kind.model(), kind.model(), kind.input()
    apply(model, kind)
    z = run(kind, plain, x, merged_weights(kind, plain, factors(model, kind)))
    torch.testing.assert_close(run(kind, model, x), z, rtol=1e-5, atol=1e-5)
