"""LoRA on modules other than `nn.Linear`, kind by kind: against PEFT with the same factors, and against the formula."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import NamedTuple

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

import graphpatch


class Kind(NamedTuple):
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    """Of an input."""
    delta: Callable[[Tensor, Tensor], Tensor]
    """From A and B what the weight gains, for a scale of one."""
    rank: int = 3
    peft: bool = True
    """Whether PEFT computes the same here."""
    rows: int = 0
    """The input is indices below this number."""
    frequency: bool = False
    """Gradients are divided by how often a row is used, which those of a weight made of others would not be."""

    def input(self, dtype: torch.dtype = torch.float32) -> Tensor:
        torch.manual_seed(2)
        if self.rows:
            return torch.randint(self.rows, self.shape)
        return torch.randn(self.shape, dtype=dtype, requires_grad=True)

    def model(self, dtype: torch.dtype = torch.float32) -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(self.make()).to(dtype)


def transposed(a: Tensor, b: Tensor) -> Tensor:
    return (b @ a).t()


def convolved(groups: int = 1) -> Callable[[Tensor, Tensor], Tensor]:
    def delta(a: Tensor, b: Tensor) -> Tensor:
        of_groups = b.reshape(groups, b.shape[0] // groups, -1) @ a.reshape(groups, a.shape[0] // groups, -1)
        return of_groups.reshape(b.shape[0], *a.shape[1:])

    return delta


def unconvolved(groups: int = 1) -> Callable[[Tensor, Tensor], Tensor]:
    def delta(a: Tensor, b: Tensor) -> Tensor:
        channels = a.unflatten(0, (groups, -1)), b.unflatten(0, (groups, -1)).flatten(2)
        return torch.einsum("gir...,gor->gio...", *channels).flatten(0, 1)

    return delta


KINDS = {
    "Conv1D": Kind(lambda: Conv1D(5, 7), (2, 4, 7), transposed),
    "Conv1D on one row": Kind(lambda: Conv1D(5, 7), (4, 7), transposed),
    "Embedding": Kind(lambda: nn.Embedding(11, 5), (2, 4), transposed, rows=11),
    "Embedding, padded": Kind(lambda: nn.Embedding(11, 5, padding_idx=3), (6, 4), transposed, rows=11),
    "Embedding, by frequency": Kind(
        lambda: nn.Embedding(5, 6, scale_grad_by_freq=True), (4, 4), transposed, rows=5, frequency=True
    ),
    "Embedding, scaled by a buffer": Kind(
        lambda: Gemma3TextScaledWordEmbedding(11, 5, 0, embed_scale=1.5), (6, 4), transposed, rows=11
    ),
    "Embedding, scaled by a number": Kind(
        lambda: BartScaledWordEmbedding(11, 5, 0, embed_scale=1.5), (6, 4), transposed, rows=11, peft=False
    ),
    "Conv1d": Kind(lambda: nn.Conv1d(4, 6, 3), (2, 4, 9), convolved()),
    "Conv1d of one sequence": Kind(lambda: nn.Conv1d(4, 6, 3, bias=False), (4, 9), convolved()),
    "Conv2d": Kind(lambda: nn.Conv2d(4, 6, (3, 2), stride=2, padding=1), (2, 4, 8, 7), convolved()),
    "Conv2d, same": Kind(lambda: nn.Conv2d(4, 6, 3, padding="same", bias=False), (2, 4, 5, 5), convolved()),
    "Conv2d, dilated": Kind(lambda: nn.Conv2d(4, 6, 3, dilation=2), (2, 4, 8, 7), convolved(), peft=False),
    "Conv2d, reflecting": Kind(
        lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 5, 5), convolved(), peft=False
    ),
    "Conv2d in groups": Kind(lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5), convolved(2), rank=4, peft=False),
    "Conv2d by depth": Kind(lambda: nn.Conv2d(4, 8, 3, groups=4), (2, 4, 5, 5), convolved(4), rank=4, peft=False),
    "ConvTranspose1d": Kind(lambda: nn.ConvTranspose1d(4, 6, 3), (2, 4, 9), unconvolved(), peft=False),
    "ConvTranspose2d": Kind(
        lambda: nn.ConvTranspose2d(4, 6, (3, 2), stride=(2, 3), padding=1, output_padding=(1, 2), bias=False),
        (2, 4, 5, 4),
        unconvolved(),
        peft=False,
    ),
    "ConvTranspose2d in groups": Kind(
        lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, dilation=2, stride=2, output_padding=1),
        (2, 4, 5, 5),
        unconvolved(2),
        rank=4,
        peft=False,
    ),
    "ConvTranspose3d": Kind(
        lambda: nn.ConvTranspose3d(2, 4, 2, stride=(1, 2, 1)), (2, 2, 4, 4, 4), unconvolved(), peft=False
    ),
    "Conv3d": Kind(lambda: nn.Conv3d(2, 4, 2, stride=(1, 2, 1)), (2, 2, 4, 4, 4), convolved()),
}


def of_kinds(chosen: Callable[[Kind], bool]) -> pytest.MarkDecorator:
    kinds = {name: kind for name, kind in KINDS.items() if chosen(kind)}
    return pytest.mark.parametrize("kind", kinds.values(), ids=kinds.keys())


every = of_kinds(lambda kind: True)
those_of_peft = of_kinds(lambda kind: kind.peft)
"""The others have another form in PEFT, or none."""
with_dropout_in_peft = of_kinds(lambda kind: kind.peft and not kind.rows)
"""PEFT's embeddings ignore dropout."""


def apply(model: nn.Module, kind: Kind, arguments: str = "", trained: bool = True) -> graphpatch.Patch:
    """LoRA with alpha = 2 rank on the module `0`; where `trained`, with factors that are not zero."""
    rules = f"patch ^0 with lora(rank={kind.rank}, alpha={2 * kind.rank}{arguments})\nfreeze ** except @new"
    patch = graphpatch.apply(model, graphpatch.parse(rules))
    if trained:
        torch.manual_seed(1)
        for parameter in patch.trainable_parameters():
            nn.init.normal_(parameter)
        padding = getattr(model[0], "padding_idx", None)
        if padding is not None:
            # Zero at first, and without a gradient ever after.
            model[0].lora_A.data[:, padding] = 0
    return patch


def peft_like(kind: Kind, patched: nn.Module, autocast: bool = True, dtype=torch.float32, **options) -> nn.Module:
    """PEFT's LoRA on the same base, with the same factors."""
    config = peft.LoraConfig(target_modules=["0"], r=kind.rank, lora_alpha=2 * kind.rank, **options)
    theirs = peft.get_peft_model(kind.model(dtype), config, autocast_adapter_dtype=autocast)
    for mine, yours in zip(factors(patched), peft_factors(theirs), strict=True):
        yours.data.copy_(mine)
    return theirs


def factors(model: nn.Module) -> list[Tensor]:
    return [model[0].lora_A, model[0].lora_B]


def peft_factors(theirs: nn.Module) -> list[Tensor]:
    layer = theirs.base_model.model[0]
    if layer.lora_embedding_A:
        return [layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]]
    return [layer.lora_A["default"].weight, layer.lora_B["default"].weight]


def inputs(x: Tensor) -> list[Tensor]:
    return [x] if x.requires_grad else []


def near(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    """Equal within the tolerance, of the largest element."""
    assert a.shape == b.shape and a.dtype == b.dtype
    assert (a - b).abs().max() <= tolerance * max(1.0, b.abs().max().item())


def like_peft(kind: Kind, options: str = "", peft_options: dict | None = None, train: bool = True) -> None:
    ours = kind.model()
    apply(ours, kind, options)
    theirs = peft_like(kind, ours, **(peft_options or {}))
    ours.train(train), theirs.train(train)
    x = kind.input()

    def both() -> list[Tensor]:
        return [(torch.manual_seed(3), model(x))[1] for model in (ours, theirs)]

    y, z = both()
    near(y, z)
    weights = torch.randn_like(y)
    mine = torch.autograd.grad((y * weights).sum(), [*inputs(x), *factors(ours)])
    yours = torch.autograd.grad((z * weights).sum(), [*inputs(x), *peft_factors(theirs)])
    for a, b in zip(mine, yours, strict=True):
        near(a, b)
    with torch.no_grad():
        near(*both())


@pytest.mark.parametrize("rslora", [False, True])
@those_of_peft
def test_forward_and_gradients_are_those_of_peft(kind, rslora):
    like_peft(kind, f", use_rslora={str(rslora).lower()}", {"use_rslora": rslora})


@pytest.mark.parametrize("train", [False, True])
@with_dropout_in_peft
def test_dropout_is_that_of_peft(kind, train):
    like_peft(kind, ", dropout=0.5", {"lora_dropout": 0.5}, train)


@every
def test_forward_and_gradients_are_those_of_the_patched_weight(kind):
    """Those of the base too, where it trains along."""
    ours, plain = kind.model(), kind.model()
    apply(ours, kind)
    ours.requires_grad_(True)
    x, (a, b) = kind.input(), factors(ours)
    state = {**dict(plain.named_parameters()), "0.weight": plain[0].weight + 2 * kind.delta(a, b)}
    y, z = ours(x), functional_call(plain, state, (x,))
    near(y, z)
    if kind.frequency:
        return
    weights, wanted = torch.randn_like(y), [*inputs(x), a, b]
    mine, yours = (
        torch.autograd.grad(
            (out * weights).sum(), [*wanted, *(model.get_parameter(name) for name, _ in plain.named_parameters())]
        )
        for out, model in ((y, ours), (z, plain))
    )
    for one, other in zip(mine, yours, strict=True):
        near(one, other)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@every
def test_on_a_bf16_base(kind, dtype):
    """Computed in bf16 (8 bits of mantissa), within 3 % of a float64 reference; float32 factors have float32
    gradients."""
    ours = kind.model(torch.bfloat16)
    apply(ours, kind, f', dtype="{dtype}"' if dtype else "")
    assert ours[0].lora_A.dtype == ours[0].lora_B.dtype == (torch.bfloat16 if dtype else torch.float32)
    exact = kind.model(torch.bfloat16).double()
    apply(exact, kind)
    for to, source in zip(factors(exact), factors(ours)):
        to.data.copy_(source.to(torch.bfloat16))
    x = kind.input(torch.bfloat16)
    y, z = ours(x), exact(x.double() if x.is_floating_point() else x)
    assert y.dtype == torch.bfloat16
    assert (y.double() - z).abs().max() < 0.03 * z.abs().max()
    grads = torch.autograd.grad(y.sum(), factors(ours))
    assert [g.dtype for g in grads] == [f.dtype for f in factors(ours)]
    for a, b in zip(grads, torch.autograd.grad(z.sum(), factors(exact)), strict=True):
        assert (a.double() - b).abs().max() < 0.03 * b.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@every
def test_identity_at_init_is_bit_exact(kind, dtype):
    plain, model = kind.model(dtype), kind.model(dtype)
    apply(model, kind, trained=False)
    x = kind.input(dtype)
    assert torch.equal(model(x), plain(x))
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))
    assert any(p.count_nonzero() for p in factors(model)) and not all(p.count_nonzero() for p in factors(model))


@every
def test_initialised_as_peft_does(kind):
    torch.manual_seed(4)
    ours = kind.model()
    apply(ours, kind, trained=False)
    config = peft.LoraConfig(target_modules=["0"], r=kind.rank)
    if kind.peft:
        theirs = peft_factors(peft.get_peft_model(kind.model(), config))
        assert [p.shape for p in factors(ours)] == [p.shape for p in theirs]
        for mine, yours in zip(factors(ours), theirs):
            assert bool(mine.count_nonzero()) == bool(yours.count_nonzero())
    weight = ours[0].weight
    assert kind.delta(*factors(ours)).shape == weight.shape


@every
def test_reverted_the_module_is_what_it_was(kind):
    model = kind.model()
    layer, weight = model[0], model[0].weight
    before, cls, held = copy.deepcopy(model.state_dict()), type(layer), list(layer.__dict__)
    patch = apply(model, kind)
    x = kind.input()
    assert set(model.state_dict()) == {*before, "0.lora_A", "0.lora_B"}
    assert set(patch.adapter_state_dict()) == {"0.lora_A", "0.lora_B"}
    assert repr(model).count("lora(rank=") == 1 and isinstance(layer, cls)
    changed = model(x)
    with patch.disabled():
        assert torch.equal(model(x), kind.model()(x))
    assert torch.equal(model(x), changed) and not torch.equal(changed, kind.model()(x))
    patch.revert()
    assert model[0] is layer and layer.weight is weight and type(layer) is cls and list(layer.__dict__) == held
    assert weight.requires_grad and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@every
def test_named_adapters_add_up(kind):
    model, plain = kind.model(), kind.model()
    rules = "\n".join(f'patch ^0 with lora(rank={kind.rank}, adapter="{name}")' for name in "ab")
    patch = graphpatch.apply(model, graphpatch.parse(rules + "\nfreeze ** except @new"))
    for parameter in patch.trainable_parameters():
        nn.init.normal_(parameter)
    layer, x = model[0], kind.input()
    delta = kind.delta(layer.lora_A_a, layer.lora_B_a) + kind.delta(layer.lora_A_b, layer.lora_B_b)
    near(
        model(x), functional_call(plain, {**dict(plain.named_parameters()), "0.weight": plain[0].weight + delta}, (x,))
    )


@every
def test_copies_and_pickles_compute_the_same_and_revert(kind):
    model, x = kind.model(), kind.input()
    apply(model, kind)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x)) and other[0].lora_A is not model[0].lora_A
        graphpatch.patches(other)[0].revert()
        assert torch.equal(other(x), kind.model()(x))


@every
def test_on_the_meta_device_and_reset_from_there(kind):
    model = kind.model().to("meta")
    apply(model, kind, trained=False)
    assert all(p.is_meta for p in factors(model)) and model(kind.input().to("meta")).is_meta
    model.to_empty(device="cpu")
    model[0].reset_parameters()
    torch.nn.init.normal_(model[0].weight)
    assert all(p.isfinite().all() and p.abs().max() < 10 for p in factors(model))
    assert kind.delta(*factors(model)).count_nonzero() == 0


@every
def test_under_autocast(kind):
    model, x = kind.model(), kind.input()
    apply(model, kind)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
        assert y.dtype == kind.model()(x).dtype
    assert (y - model(x)).abs().max() < 0.03 * model(x).abs().max()
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.float().sum(), factors(model)))


@pytest.mark.parametrize("reentrant", [False, True])
@every
def test_checkpointed(kind, reentrant):
    model, x = kind.model(), kind.input()
    apply(model, kind)
    wanted = [*inputs(x), *factors(model)]
    plain = torch.autograd.grad(model(x).pow(2).sum(), wanted)
    # The reentrant kind asks for an input that has a gradient, which indices have not.
    if reentrant and kind.rows:
        anchor = torch.zeros((), requires_grad=True)
        checkpoint(lambda anchor: model(x) + anchor, anchor, use_reentrant=True).pow(2).sum().backward()
    else:
        checkpoint(model, x, use_reentrant=reentrant).pow(2).sum().backward()
    for a, b in zip(plain, wanted, strict=True):
        near(a, b.grad)


@every
def test_compiled_and_exported(kind):
    model, x = kind.model(), kind.input()
    apply(model, kind)
    torch._dynamo.reset()  # all kinds stand in one Sequential.forward, which has a limit
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    near(compiled(x), model(x))
    near(torch.export.export(model.eval(), (x.detach(),)).module()(x), model(x))


# ── what only some have ──


def test_a_weight_normed_convolution_keeps_its_parametrisation():
    torch.manual_seed(0)
    model = nn.Sequential(weight_norm(nn.Conv1d(4, 6, 3)))
    kind = Kind(lambda: nn.Conv1d(4, 6, 3), (2, 4, 9), convolved())
    x = kind.input()
    before = model(x)
    patch = apply(model, kind)
    weight = model[0].weight + 2 * kind.delta(*factors(model))
    near(model(x), nn.functional.conv1d(x, weight, model[0].bias))
    nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    near(model(x), nn.functional.conv1d(x, weight, model[0].bias))
    patch.revert()
    near(model(x), before)


def test_dropout_on_an_embedding_drops_whole_tokens():
    kind = KINDS["Embedding"]
    model, plain = kind.model(), kind.model()
    apply(model, kind, ", dropout=0.5")
    x = torch.arange(11).repeat(20, 1)
    with torch.no_grad():
        full = model.eval()(x) - plain(x)
        dropped = model.train()(x) - plain(x)
    kept = dropped.abs().amax(-1) > 1e-5
    assert 0.35 < kept.float().mean() < 0.65
    torch.testing.assert_close(dropped[kept], 2 * full[kept], atol=1e-5, rtol=1e-5)


def test_the_row_of_the_padding_stays_what_it_is():
    kind = KINDS["Embedding, padded"]
    model = kind.model()
    patch = apply(model, kind, trained=False)
    optimizer = torch.optim.AdamW(patch.trainable_parameters(), lr=0.1)
    x = torch.arange(11)
    for _ in range(3):
        optimizer.zero_grad()
        (model(x) - 1).pow(2).sum().backward()
        optimizer.step()
    pad, other = torch.tensor([3]), torch.tensor([4])
    assert torch.equal(model(pad), kind.model()(pad)) and not torch.equal(model(other), kind.model()(other))


class Positions(nn.Embedding):
    """Rows counted from an offset, as many position embeddings of Transformers do."""

    def forward(self, input):
        return super().forward(input + 2)


class SamePadded(nn.Conv2d):
    """As timm has it: padded in forward, so that the input is not what is convolved."""

    def forward(self, input):
        return super().forward(nn.functional.pad(input, (1, 1, 1, 1)))


@pytest.mark.parametrize(
    ("module", "options", "says"),
    [
        (lambda: nn.Embedding(5, 4, max_norm=1.0), "", "max_norm"),
        (lambda: nn.Embedding(5, 4, sparse=True), "", "sparse"),
        (lambda: nn.Embedding(5, 4), ', init="gaussian"', "no effect"),
        (lambda: nn.EmbeddingBag(5, 4), "", "does not accept EmbeddingBag"),
        (lambda: Positions(5, 4), "", "graphpatch.accept"),
        (lambda: SamePadded(4, 4, 3), "", "graphpatch.accept"),
        (lambda: nn.Conv2d(6, 6, 3, groups=3), "", "3 groups"),
        (lambda: nn.ConvTranspose2d(6, 6, 3, groups=3), "", "3 groups"),
        (lambda: nn.ConvTranspose2d(4, 4, 3), ", dora=true", "no effect"),
        (lambda: nn.Bilinear(4, 4, 3), "", "does not accept Bilinear"),
        (lambda: nn.LazyConvTranspose2d(4, 3), "", "run the model once"),
    ],
)
def test_what_would_be_wrong_is_refused(module, options, says):
    with pytest.raises(graphpatch.PlanError, match=says) as caught:
        graphpatch.parse(f"patch ^0 with lora(rank=2{options})").plan(nn.Sequential(module()))
    assert caught.value.code == "GP410"


class Renamed(nn.Embedding):
    """A subclass whose forward is its base's."""


def test_a_subclass_is_admitted_by_a_row(monkeypatch):
    from graphpatch.ops.lora import Lora

    monkeypatch.setattr(Lora, "accepts", Lora.accepts)  # so that what `accept` puts there is taken back
    kind = Kind(lambda: Renamed(11, 5), (2, 4), transposed, rows=11)
    with pytest.raises(graphpatch.PlanError, match=r"graphpatch\.accept\(") as caught:
        apply(kind.model(), kind)
    row = f"{Renamed.__module__}.{Renamed.__qualname__}", Lora.accepts["torch.nn.modules.sparse.Embedding"]
    assert f'graphpatch.accept("lora", "{row[0]}", "{row[1]}")' in str(caught.value)
    graphpatch.accept("lora", *row)
    model = kind.model()
    apply(model, kind)
    weight = model[0].weight + 2 * kind.delta(*factors(model))
    near(model(kind.input()), nn.functional.embedding(kind.input(), weight))


@pytest.mark.parametrize(
    ("cls", "sizes", "x"),
    [
        (nn.Linear, (7, 5), torch.randn(2, 7)),
        (nn.Conv2d, (4, 6, 3), torch.randn(2, 4, 5, 5)),
        (nn.Embedding, (11, 5), torch.arange(11)),
    ],
    ids=["Linear", "Conv2d", "Embedding"],
)
def test_a_new_instance_of_a_patched_class_is_a_base(cls, sizes, x):
    patched = nn.Sequential(cls(*sizes))
    rules = "patch ^0 with lora(rank=3) then scale.output(2)\nfreeze ** except @new"
    graphpatch.apply(patched, graphpatch.parse(rules))
    new, plain = type(patched[0])(*sizes), cls(*sizes)
    plain.load_state_dict(new.state_dict())
    assert torch.equal(new(x), plain(x))


def test_a_transposed_convolution_asked_for_its_output_size():
    kind = KINDS["ConvTranspose2d in groups"]
    ours, plain, x = kind.model(), kind.model(), kind.input()
    apply(ours, kind)
    wanted = plain[0](x).shape[-1] - 1
    state = {**dict(plain[0].named_parameters()), "weight": plain[0].weight + 2 * kind.delta(*factors(ours))}
    y = ours[0](x, output_size=[wanted, wanted])
    near(y, functional_call(plain[0], state, (x,), {"output_size": [wanted, wanted]}))


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_a_transposed_convolution_starts_as_a_convolution_would(init):
    """By what a rank channel sees of the input, in / groups x kernel, or the rank."""
    model = nn.Sequential(nn.ConvTranspose2d(64, 8, 3, groups=2))
    graphpatch.apply(model, graphpatch.parse(f'patch ^0 with lora(rank=16, init="{init}")\nfreeze ** except @new'))
    a, bound = model[0].lora_A, (32 * 9) ** -0.5
    if init == "kaiming":
        assert a.abs().max() <= bound and abs(a.std().item() / (bound / 3**0.5) - 1) < 0.05
    else:
        assert abs(a.std().item() * 16 - 1) < 0.05
