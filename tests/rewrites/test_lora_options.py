"""LoRA's options: what they start from, how they train, and that they come and go like any adapter."""

from __future__ import annotations

import copy
import pickle

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers.pytorch_utils import Conv1D

import graphpatch

KINDS = {
    "Linear": (lambda: nn.Linear(7, 6), (3, 7)),
    "Linear without bias": (lambda: nn.Linear(7, 6, bias=False), (3, 7)),
    "Conv1D": (lambda: Conv1D(6, 7), (3, 7)),
    "Embedding": (lambda: nn.Embedding(11, 6, padding_idx=3), (3, 5)),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3), (2, 4, 9)),
    "Conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 5, 5)),
    "Conv2d in groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    "Conv3d": (lambda: nn.Conv3d(2, 4, 2), (2, 2, 4, 4, 4)),
}
OF_LINEARS = ["Linear", "Linear without bias", "Conv1D"]
OPTIONS = {
    "dora=true": [*KINDS],
    "bias=true": [kind for kind in KINDS if kind != "Embedding"],
    'init="pissa", alpha=3': OF_LINEARS,
    'init="pissa", iterations=4': OF_LINEARS,
    'init="olora"': OF_LINEARS,
    'init="pissa", dora=true, alpha=3': OF_LINEARS,
}
ROWS = [(kind, options) for options, kinds in OPTIONS.items() for kind in kinds]
every = pytest.mark.parametrize(("kind", "options"), ROWS, ids=[f"{kind}: {options}" for kind, options in ROWS])


def model_of(kind: str, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(KINDS[kind][0]()).to(dtype)


def input_of(kind: str, dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(2)
    shape = KINDS[kind][1]
    return torch.randint(11, shape) if kind == "Embedding" else torch.randn(shape, dtype=dtype, requires_grad=True)


def apply(model: nn.Module, options: str, moved: bool = True, rank: int = 4) -> graphpatch.Patch:
    """The adapter on the module `0`; where `moved`, away from where it started."""
    rules = f"patch ^0 with lora(rank={rank}, {options})\nfreeze ** except @new"
    patch = graphpatch.apply(model, graphpatch.parse(rules))
    if moved:
        move(patch)
    return patch


def move(patch: graphpatch.Patch) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in patch.model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
                if name.endswith("lora_A") and getattr(patch.model[0], "padding_idx", None) is not None:
                    parameter[:, 3] = 0  # as it starts, and without a gradient ever after


def near(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance * max(1.0, b.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@every
def test_at_first_the_model_computes_what_it_did_bit_for_bit(kind, options, dtype):
    plain, model = model_of(kind, dtype), model_of(kind, dtype)
    patch = apply(model, options, moved=False)
    x = input_of(kind, dtype)
    for train in (True, False):
        assert torch.equal(model.train(train)(x), plain(x))
        with torch.no_grad():
            assert torch.equal(model(x), plain(x))
    # The weight is the very one, also where PiSSA and OLoRA would have taken their part out of it.
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in model.state_dict().items() if "lora" not in k)
    model(x).float().pow(2).sum().backward()
    moving = [p.grad.abs().max() > 0 for p in patch.trainable_parameters()]
    assert any(moving) and all(p.grad.isfinite().all() for p in patch.trainable_parameters())


@every
def test_switched_off_and_reverted_the_module_is_what_it_was(kind, options):
    model, plain, x = model_of(kind), model_of(kind), input_of(kind)
    patch = apply(model, options)
    changed = model(x)
    assert not torch.equal(changed, plain(x))
    with patch.disabled():
        assert torch.equal(model(x), plain(x))
    assert torch.equal(model(x), changed)
    patch.revert()
    assert torch.equal(model(x), plain(x)) and model.state_dict().keys() == plain.state_dict().keys()
    assert not list(model[0].__dict__["_buffers"]) and type(model[0]) is type(plain[0])


@every
def test_saved_and_loaded_onto_the_untouched_base(kind, options, tmp_path):
    model, x = model_of(kind), input_of(kind)
    patch = apply(model, options)
    graphpatch.save_adapter(patch, tmp_path / "adapter")
    other = model_of(kind)
    loaded = graphpatch.load_adapter(other, tmp_path / "adapter")
    assert torch.equal(other(x), model(x))
    state = loaded.adapter_state_dict()
    assert state.keys() == patch.adapter_state_dict().keys()
    assert {f"0.{name}" for name in model[0]._lora[0].tensors} == state.keys()
    assert not any(name.endswith("_init") for name, _ in other.named_parameters())


@every
def test_copies_and_pickles(kind, options):
    model, x = model_of(kind), input_of(kind)
    apply(model, options)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))
        graphpatch.patches(other)[0].revert()
        assert torch.equal(other(x), model_of(kind)(x))


@pytest.mark.parametrize(
    ("kind", "options"),
    [row for row in ROWS if row[0] in ("Linear", "Conv1D") or (row[0] in ("Embedding", "Conv2d") and "dora" in row[1])],
)
def test_compiled_without_a_break(kind, options):
    model, x = model_of(kind), input_of(kind)
    apply(model, options)
    torch.compiler.reset()  # the tests before this one compiled the same code
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    parameters = [p for p in model.parameters() if p.requires_grad]
    y, z = compiled(x), model(x)
    near(y, z)
    for a, b in zip(torch.autograd.grad(y.sum(), parameters), torch.autograd.grad(z.sum(), parameters), strict=True):
        near(a, b)


@every
def test_from_the_meta_device(kind, options):
    model = model_of(kind).to("meta")
    apply(model, options, moved=False)
    assert model(input_of(kind).to("meta")).is_meta
    model.to_empty(device="cpu")
    if kind == "Conv1D":  # which has no reset of its own
        nn.init.normal_(model[0].weight)
        nn.init.zeros_(model[0].bias)
    model[0].reset_parameters()
    x = input_of(kind)
    with graphpatch.patches(model)[0].disabled():
        before = model(x)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("options", ["dora=true", 'init="pissa"', "bias=true", "dora=true, dropout=0.3"])
def test_checkpointed(options, reentrant):
    model, x = model_of("Linear"), input_of("Linear")
    patch = apply(model, options)
    wanted = [x, *patch.trainable_parameters()]
    torch.manual_seed(5)
    plain = torch.autograd.grad(model(x).pow(2).sum(), wanted)
    torch.manual_seed(5)
    checkpoint(model, x, use_reentrant=reentrant).pow(2).sum().backward()
    for a, b in zip(plain, wanted, strict=True):
        torch.testing.assert_close(a, b.grad)


@pytest.mark.parametrize("options", ["dora=true", 'init="pissa", dora=true', "bias=true"])
def test_under_autocast(options):
    model, x = model_of("Linear"), input_of("Linear")
    patch = apply(model, options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    near(y.float(), model(x), 0.03)
    grads = torch.autograd.grad(y.float().sum(), patch.trainable_parameters())
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("options", ["dora=true", 'init="pissa"', "bias=true", 'init="olora", dora=true'])
def test_function_transforms(options):
    model, x = model_of("Linear"), torch.randn(6, 4, 7)
    apply(model, options)
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def loss(trained, x):
        return functional_call(model, {**state, **trained}, x).pow(2).sum()

    each, together = vmap(grad(loss), in_dims=(None, 0))(trained, x), grad(loss)(trained, x)
    for name in trained:
        near(each[name].sum(0), together[name], 1e-4)
    many = {name: torch.stack([p.detach(), 2 * p.detach()]) for name, p in trained.items()}
    outputs = vmap(lambda some: functional_call(model, {**state, **some}, x[0]))(many)
    near(outputs[0], model(x[0]))


# ── DoRA ──


def test_dora_is_its_formula():
    model, x = model_of("Linear"), input_of("Linear")
    apply(model, "dora=true, alpha=8")
    layer = model[0]
    v = layer.weight + 2 * layer.lora_B @ layer.lora_A
    near(model(x), linear(x, layer.lora_magnitude[:, None] * v / v.norm(dim=1, keepdim=True), layer.bias))


def test_the_length_of_a_row_is_a_constant_to_backward():
    """Section 4.3 of the paper: the gradient of B is that of a fixed gain."""
    model, x = model_of("Linear"), input_of("Linear")
    apply(model, "dora=true")
    layer = model[0]
    v = layer.weight + layer.lora_B @ layer.lora_A
    gain = layer.lora_magnitude / v.norm(dim=1).detach()
    y = linear(x, v) * gain + layer.bias
    wanted = [x, layer.lora_A, layer.lora_B, layer.lora_magnitude]
    for a, b in zip(
        torch.autograd.grad(model(x).pow(2).sum(), wanted), torch.autograd.grad(y.pow(2).sum(), wanted), strict=True
    ):
        near(a, b)


def test_the_base_may_train_beside_dora():
    model, x = model_of("Linear"), input_of("Linear")
    apply(model, "dora=true")
    model.requires_grad_(True)
    layer = model[0]
    v = layer.weight + layer.lora_B @ layer.lora_A
    y = linear(x, v) * (layer.lora_magnitude / v.norm(dim=1).detach()) + layer.bias
    wanted = [layer.weight, layer.bias]
    for a, b in zip(
        torch.autograd.grad(model(x).pow(2).sum(), wanted), torch.autograd.grad(y.pow(2).sum(), wanted), strict=True
    ):
        near(a, b)


@pytest.mark.parametrize("kind", ["Linear", "Conv2d"])
def test_a_row_of_zeros_is_no_nan(kind):
    """A pruned channel, a convolution that ControlNet starts at zero: PEFT divides zero by zero."""
    model, x = model_of(kind), input_of(kind)
    nn.init.zeros_(model[0].weight)
    before = model(x)
    patch = apply(model, "dora=true", moved=False)
    y = model(x)
    assert torch.equal(y, before)
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in patch.trainable_parameters())


def test_dora_beside_other_adapters_is_the_sum_of_what_each_does():
    model, x = model_of("Linear"), input_of("Linear")
    for name, options in (("a", "dora=true"), ("b", "alpha=8"), ("c", 'init="pissa"')):
        rules = f'patch ^0 with lora(rank=4, {options}, adapter="{name}")\nfreeze ** except @new'
        move(graphpatch.apply(model, graphpatch.parse(rules)))
    together, base = model(x), model_of("Linear")(x)
    alone = []
    for patch in graphpatch.patches(model):
        others = [other for other in graphpatch.patches(model) if other != patch]
        with others[0].disabled(), others[1].disabled():
            alone.append(model(x) - base)
    near(together, base + sum(alone))


def beside(*options: str) -> tuple[nn.Module, list[graphpatch.Patch]]:
    """One adapter of each on one linear, each a patch of its own."""
    model, made = model_of("Linear"), []
    for name, some in zip("abc", options):
        rules = f'patch ^0 with lora(rank=4, {some}, adapter="{name}")\nfreeze ** except @new'
        made.append(graphpatch.apply(model, graphpatch.parse(rules)))
        move(made[-1])
    return model, made


def test_dora_is_merged_before_others_and_never_two():
    x = input_of("Linear")
    model, (dora, plain) = beside("dora=true", "alpha=8")
    together = model(x)
    with pytest.raises(graphpatch.ApplyError, match="goes by what the weight is now") as caught:
        plain.merge()
    assert caught.value.code == "GP531" and torch.equal(model(x), together)
    dora.merge()
    near(model(x), together)
    plain.merge()
    near(model(x), together)
    plain.unmerge()
    dora.unmerge()
    assert torch.equal(model(x), together)

    model, both = beside("dora=true", "dora=true")
    for patch in both:
        with pytest.raises(graphpatch.ApplyError, match="goes by what the weight is now"):
            patch.merge()

    for count, rules in ((2, ("alpha=8", "dora=true")), (3, ("dora=true", "alpha=8", "dora=true"))):
        model = model_of("Linear")
        text = "\n".join(f'patch ^0 with lora(rank=4, {o}, adapter="{n}")' for n, o in zip("abc", rules))
        patch = graphpatch.apply(model, graphpatch.parse(text + "\nfreeze ** except @new"))
        move(patch)
        together = model(x)
        if count == 3:
            with pytest.raises(graphpatch.ApplyError, match="two adapters scale the rows"):
                patch.merge()
        else:
            patch.merge()
            near(model(x), together)


# ── factors that the weight knows ──


def trained(model: nn.Module, parameters: list[Tensor], steps: int = 12) -> list[float]:
    torch.manual_seed(6)
    x, y = torch.randn(32, 7), torch.randn(32, 6)
    optimizer, losses = torch.optim.AdamW(parameters, lr=0.02), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - y).pow(2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
@pytest.mark.parametrize(
    ("options", "theirs"),
    [
        ('init="pissa", alpha=6', {"init_lora_weights": "pissa", "lora_alpha": 6}),
        ('init="pissa", alpha=6, use_rslora=true', {"init_lora_weights": "pissa", "lora_alpha": 6, "use_rslora": True}),
        ('init="olora"', {"init_lora_weights": "olora", "lora_alpha": 4}),
        ('init="pissa", dora=true', {"init_lora_weights": "pissa", "use_dora": True, "lora_alpha": 4}),
    ],
)
def test_training_is_that_of_peft_which_changes_the_base(kind, options, theirs):
    """From each one's own start: signs of singular vectors are free, and training does not see them."""
    if kind == "Conv1D" and "olora" in options:
        with pytest.raises(RuntimeError):  # PEFT takes the weight for its transpose
            reference(kind, theirs)
        return
    model, before = model_of(kind), model_of(kind)[0].weight
    patch = apply(model, options, moved=False)
    reference_model = reference(kind, theirs)
    a, b = model[0].lora_A.detach().clone(), model[0].lora_B.detach().clone()
    layer = reference_model.base_model.model[0]
    near(b @ a, (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).detach())
    assert not torch.equal(layer.base_layer.weight, before)
    mine = trained(model, patch.trainable_parameters())
    yours = trained(reference_model, [p for p in reference_model.parameters() if p.requires_grad])
    assert mine[-1] < mine[0]
    near(torch.tensor(mine), torch.tensor(yours), 1e-4)
    assert torch.equal(model[0].weight, before)


def reference(kind: str, options: dict) -> nn.Module:
    model = peft.get_peft_model(model_of(kind), peft.LoraConfig(target_modules=["0"], r=4, **options))
    model(input_of(kind))
    return model


def test_pissa_holds_the_principal_part_and_olora_an_orthogonal_one():
    model = model_of("Linear")
    weight = model[0].weight
    u, s, v = torch.linalg.svd(weight)
    apply(model, 'init="pissa", alpha=6', moved=False)
    near(1.5 * model[0].lora_B @ model[0].lora_A, u[:, :4] @ torch.diag(s[:4]) @ v[:4])
    near(model[0].lora_A.norm(dim=1), model[0].lora_B.norm(dim=0))
    other = model_of("Linear")
    apply(other, 'init="olora"', moved=False)
    near(other[0].lora_B.T @ other[0].lora_B, torch.eye(4))
    near((weight - other[0].lora_B @ other[0].lora_A).T @ other[0].lora_B, torch.zeros(7, 4))


def test_fast_pissa_is_near_the_full_one():
    torch.manual_seed(0)
    values = 0.8 ** torch.arange(24)
    u, v = (torch.linalg.qr(torch.randn(n, 24))[0] for n in (40, 30))
    products = []
    for options in ('init="pissa"', 'init="pissa", iterations=16'):
        model = nn.Sequential(nn.Linear(30, 40))
        model[0].weight.data = u @ torch.diag(values) @ v.T
        apply(model, options, moved=False, rank=6)
        products.append(model[0].lora_B @ model[0].lora_A)
    near(*products)


def test_orthogonal_factors_give_nothing_at_first():
    model, x = model_of("Linear"), input_of("Linear")
    apply(model, 'init="orthogonal"', moved=False)
    a, b = model[0].lora_A, model[0].lora_B
    assert a.abs().max() > 0.01 and b.abs().max() > 0.01 and (b @ a).abs().max() < 1e-6
    near(model(x), model_of("Linear")(x))
    theirs = peft.get_peft_model(
        nn.Sequential(nn.Linear(400, 300)), peft.LoraConfig(target_modules=["0"], r=8, init_lora_weights="orthogonal")
    ).base_model.model[0]
    ours = nn.Sequential(nn.Linear(400, 300))
    apply(ours, 'init="orthogonal"', moved=False, rank=8)
    for mine, yours in ((ours[0].lora_A, theirs.lora_A), (ours[0].lora_B, theirs.lora_B)):
        assert mine.std().item() == pytest.approx(yours["default"].weight.std().item(), rel=0.1)


def test_on_a_bf16_base_the_small_differences_are_not_lost():
    """(B - B0) A + B0 (A - A0) is formed in the factors' float32: a first small step is seen, where B A and B0 A0 in
    bf16 would differ by their rounding."""
    model, x = model_of("Linear", torch.bfloat16), input_of("Linear", torch.bfloat16)
    apply(model, 'init="pissa"', moved=False)
    with torch.no_grad():
        base = model(x)
        model[0].lora_B += 1e-3
        step = torch.tensor(1e-3) * (x.float() @ model[0].lora_A.T).sum(-1, keepdim=True)
        added = model[0]._addend(model[0]._lora[0], x, base).float()
    near(added, step.expand_as(added), 1e-4)


@pytest.mark.parametrize("options", ["dora=true", 'init="pissa"', 'init="olora", dora=true', "dora=true, dropout=0.4"])
def test_beside_a_quantised_weight(options):
    """As beside the dense weight that it stands for."""
    torch.manual_seed(0)
    quantised = nn.Sequential(nn.Linear(32, 16)).to(torch.bfloat16)
    dense = copy.deepcopy(quantised)
    quantize_(quantised, Int8WeightOnlyConfig())
    dense[0].weight = nn.Parameter(quantised[0].weight.dequantize())
    x = torch.randn(5, 32, dtype=torch.bfloat16)
    before = quantised(x)
    patches = [apply(model, options, moved=False) for model in (quantised, dense)]
    assert torch.equal(quantised.eval()(x), before)
    for patch in patches:
        move(patch)
    dense[0].load_state_dict({k: v for k, v in quantised[0].state_dict().items() if "lora" in k}, strict=False)
    outputs, grads = [], []
    for model, patch in zip((quantised, dense), patches):
        model.train()
        torch.manual_seed(3)
        outputs.append(model(x).float())
        grads.append(torch.autograd.grad(outputs[-1].pow(2).sum(), patch.trainable_parameters()))
    near(*outputs, 0.03)
    for a, b in zip(*grads, strict=True):
        near(a, b, 0.03)


# ── what is refused ──


@pytest.mark.parametrize(
    ("module", "options", "says"),
    [
        (lambda: nn.Embedding(5, 4), "bias=true", "`bias=true` has no effect on Embedding"),
        (lambda: nn.Embedding(5, 4), 'init="pissa"', "`init` has no effect on Embedding"),
        (lambda: nn.Conv2d(4, 4, 3), 'init="pissa"', '`init="pissa"` has no effect on Conv2d'),
        (lambda: nn.Conv2d(4, 4, 3), 'init="orthogonal"', "made for the one weight of a linear"),
        (lambda: nn.Linear(3, 9), 'init="pissa"', "at most 3 directions"),
        (lambda: nn.Linear(9, 3), 'init="olora"', "at most 3 directions"),
    ],
)
def test_an_option_without_effect_is_refused(module, options, says):
    with pytest.raises(graphpatch.PlanError, match=says) as caught:
        graphpatch.parse(f"patch ^0 with lora(rank=4, {options})").plan(nn.Sequential(module()))
    assert caught.value.code == "GP410"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("bias=true, dora=true", "do not go together"),
        ("iterations=4", 'with init="pissa" alone'),
        ('iterations=4, init="olora"', 'with init="pissa" alone'),
        ('init="pissa", alpha=0', "alpha must be above 0"),
        ('init="olora", alpha=-1', "alpha must be above 0"),
        ('init="orthogonal", rank=3', "3 is odd"),
        ('init="pisa"', "must be one of"),
        ("dora=1", "true or false"),
    ],
)
def test_arguments_that_do_not_agree_are_refused(options, says):
    with pytest.raises(graphpatch.Error, match=says):
        graphpatch.parse(f"patch ^0 with lora({options})").plan(nn.Sequential(nn.Linear(4, 4)))


def test_a_bias_without_a_base_bias_trains_and_cannot_be_merged():
    from graphpatch.rewrites.merging import Unmergeable

    model, x = model_of("Linear without bias"), input_of("Linear without bias")
    patch = apply(model, "bias=true, alpha=8")
    layer = model[0]
    near(model(x), linear(x, layer.weight + 2 * layer.lora_B @ layer.lora_A, 2 * layer.lora_B_bias))
    change = patch._journal.changes[0]
    with pytest.raises(Unmergeable, match="no place in a base without one"):
        change.mixin.merging(change.entry, {n: getattr(layer, n) for n in change.added}, {"weight": (6, 7)})
