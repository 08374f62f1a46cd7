"""LoRA's arithmetic against PEFT's, and under everything that looks on."""

from __future__ import annotations

import itertools

import peft
import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jvp, vmap
from torch.utils.checkpoint import checkpoint

import graphpatch
from graphpatch.rewrites import low_rank


def linear(bias: bool = True, dtype: torch.dtype = torch.float32, out: int = 5) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, out, bias=bias, dtype=dtype))


def patched(model: nn.Module, arguments: str = "rank=3, alpha=6", trained: bool = True) -> nn.Module:
    patch = graphpatch.apply(model, graphpatch.parse(f"patch :Linear with lora({arguments})\nfreeze ** except @new"))
    if trained:
        torch.manual_seed(1)
        for parameter in patch.trainable_parameters():
            nn.init.normal_(parameter)
    return model


def peft_like(model: nn.Module, ours: nn.Module, autocast: bool = True, **options) -> nn.Module:
    """PEFT's LoRA on the same base, with the same factors."""
    config = peft.LoraConfig(target_modules=["0"], r=3, lora_alpha=6, **options)
    theirs = peft.get_peft_model(model, config, autocast_adapter_dtype=autocast)
    layer = theirs.base_model.model[0]
    layer.lora_A["default"].weight.data.copy_(ours[0].lora_A)
    layer.lora_B["default"].weight.data.copy_(ours[0].lora_B)
    return theirs


def factors(ours, theirs):
    layer = theirs.base_model.model[0]
    return [ours[0].lora_A, ours[0].lora_B], [layer.lora_A["default"].weight, layer.lora_B["default"].weight]


@pytest.mark.parametrize("turn", [(1, 0, 2), (2, 0, 1), (0, 2, 1)])
def test_inputs_that_are_not_contiguous(turn):
    ours = patched(linear())
    theirs = peft_like(linear(), ours)
    back = [turn.index(i) for i in range(3)]
    x = torch.randn([(2, 4, 7)[i] for i in turn]).permute(back).requires_grad_()
    assert not x.is_contiguous()
    near(ours(x), theirs(x))
    weights = torch.randn(2, 5, 4).transpose(1, 2)
    for a, b in zip(
        torch.autograd.grad((ours(x) * weights).sum(), [x, ours[0].lora_A]),
        torch.autograd.grad((theirs(x) * weights).sum(), [x, factors(ours, theirs)[1][0]]),
        strict=True,
    ):
        near(a, b)


def near(a: torch.Tensor, b: torch.Tensor) -> None:
    """Equal within 1e-6 of the largest element."""
    assert a.shape == b.shape
    if a.numel():
        assert (a - b).abs().max() <= 1e-6 * max(1.0, b.abs().max().item())


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(7,), (4, 7), (2, 4, 7), (0, 7)])
def test_forward_and_gradients_are_those_of_peft_fp32(shape, bias, rslora):
    ours = patched(linear(bias), f"rank=3, alpha=6, use_rslora={str(rslora).lower()}")
    theirs = peft_like(linear(bias), ours, use_rslora=rslora)
    x = torch.randn(shape, requires_grad=True)
    y, z = ours(x), theirs(x)
    near(y, z)
    weights = torch.randn_like(y)
    mine, yours = factors(ours, theirs)
    for a, b in zip(
        torch.autograd.grad((y * weights).sum(), [x, *mine]),
        torch.autograd.grad((z * weights).sum(), [x, *yours]),
        strict=True,
    ):
        near(a, b)
    with torch.no_grad():
        near(ours(x), theirs(x))


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_on_a_bf16_base(dtype):
    """The update is computed in bf16 (8 bits of mantissa): within 2 % of a float64 reference, as PEFT's is with bf16
    factors; float32 factors keep float32 gradients."""
    ours = patched(linear(dtype=torch.bfloat16), "rank=3, alpha=6" + (f', dtype="{dtype}"' if dtype else ""))
    assert ours[0].lora_A.dtype == (torch.bfloat16 if dtype else torch.float32)
    exact = linear(dtype=torch.bfloat16).double()
    patched(exact)
    exact[0].lora_A.data.copy_(ours[0].lora_A.to(torch.bfloat16))
    exact[0].lora_B.data.copy_(ours[0].lora_B.to(torch.bfloat16))
    x = torch.randn(4, 7, dtype=torch.bfloat16, requires_grad=True)
    y, z = ours(x), exact(x.double())
    assert y.dtype == torch.bfloat16
    scale = z.abs().max()
    assert (y.double() - z).abs().max() < 0.02 * scale
    grads = torch.autograd.grad(y.sum(), [x, ours[0].lora_A, ours[0].lora_B])
    assert [g.dtype for g in grads] == [torch.bfloat16, ours[0].lora_A.dtype, ours[0].lora_B.dtype]
    for a, b in zip(grads[1:], torch.autograd.grad(z.sum(), [exact[0].lora_A, exact[0].lora_B]), strict=True):
        assert (a.double() - b).abs().max() < 0.02 * b.abs().max()


def test_the_input_is_saved_once_and_in_its_own_dtype():
    model = patched(linear(dtype=torch.bfloat16))
    saved = []
    x = torch.randn(4, 7, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model(x)
    inputs = [t for t in saved if t.shape == x.shape]
    assert [t.data_ptr() for t in inputs] == [x.data_ptr()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_identity_at_init_is_bit_exact(dtype):
    x = torch.randn(64, 7, dtype=dtype, requires_grad=True)
    plain, model = linear(dtype=dtype), patched(linear(dtype=dtype), trained=False)
    assert torch.equal(model(x), plain(x))
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))


def test_the_statistics_of_initialisation_are_those_of_peft():
    big = nn.Sequential(nn.Linear(512, 8))
    for init, option in (("kaiming", True), ("gaussian", "gaussian")):
        ours = patched(nn.Sequential(nn.Linear(512, 8)), f'rank=64, init="{init}"', trained=False)[0]
        config = peft.LoraConfig(target_modules=["0"], r=64, init_lora_weights=option)
        theirs = peft.get_peft_model(big, config).base_model.model[0].lora_A["default"].weight
        assert abs(ours.lora_A.mean()) < 0.01 * ours.lora_A.abs().max()
        assert ours.lora_A.std().item() == pytest.approx(theirs.std().item(), rel=0.02)
        assert ours.lora_A.abs().max().item() == pytest.approx(theirs.abs().max().item(), rel=0.2)
        assert ours.lora_B.count_nonzero() == 0
        big = nn.Sequential(nn.Linear(512, 8))


def test_without_alpha_the_scale_is_one():
    model = patched(linear(bias=False), "rank=3")
    x = torch.randn(4, 7)
    expected = x @ (model[0].weight + model[0].lora_B @ model[0].lora_A).T
    torch.testing.assert_close(model(x), expected)


def test_dropout_acts_on_the_adapter_alone_and_only_in_training():
    model = patched(linear(), "rank=3, alpha=6, dropout=0.5")
    theirs = peft_like(linear(), model, lora_dropout=0.5)
    x = torch.randn(4, 7, requires_grad=True)
    for train in (True, False):
        model.train(train), theirs.train(train)
        torch.manual_seed(3)
        y = model(x)
        torch.manual_seed(3)
        z = theirs(x)
        torch.testing.assert_close(y, z, atol=1e-6, rtol=1e-6)
        mine, yours = factors(model, theirs)
        for a, b in zip(torch.autograd.grad(y.sum(), [x, *mine]), torch.autograd.grad(z.sum(), [x, *yours])):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    plain = linear()
    model.train()
    with torch.no_grad():
        model[0].lora_B.zero_()
    assert torch.equal(model(x), plain(x))


def test_adapters_add_up():
    rules = 'patch :Linear with lora(rank=2, adapter="a")\npatch :Linear with lora(rank=3, alpha=9, adapter="b")'
    model = linear(bias=False)
    with pytest.warns(UserWarning, match="freeze"):
        patch = graphpatch.apply(model, graphpatch.parse(rules))
    for tensor in patch.adapter_state_dict().values():
        nn.init.normal_(tensor)
    layer, x = model[0], torch.randn(4, 7)
    weight = layer.weight + layer.lora_B_a @ layer.lora_A_a + 3 * layer.lora_B_b @ layer.lora_A_b
    torch.testing.assert_close(model(x), x @ weight.T)


def test_the_base_may_train_along():
    model, x = patched(linear()), torch.randn(2, 4, 7)
    for parameter in model.parameters():
        parameter.requires_grad = True
    fused = torch.autograd.grad(model(x).pow(2).sum(), list(model.parameters()))
    layer = model[0]
    weight = layer.weight + 2 * layer.lora_B @ layer.lora_A
    composed = torch.autograd.grad(nn.functional.linear(x, weight, layer.bias).pow(2).sum(), list(model.parameters()))
    for a, b in zip(fused, composed, strict=True):
        torch.testing.assert_close(a, b)


# ── the fused form, and when it steps back ──


def uses(call) -> bool:
    """Whether the call goes through the fused Function."""
    out = call()
    return "LinearWithLowRank" in type(out.grad_fn).__name__ or "LinearWithLowRank" in str(out.grad_fn)


def test_eager_training_is_fused_and_the_rest_is_not():
    model, x = patched(linear()), torch.randn(4, 7, requires_grad=True)
    assert uses(lambda: model(x))
    assert not uses(lambda: model(x[0]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not uses(lambda: model(x))
    with torch.no_grad():
        assert not uses(lambda: model(x))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(4, 7), (2, 3, 7)])
def test_its_output_may_be_changed_in_place_as_that_of_a_linear_may(bias, shape):
    ours, x = patched(linear(bias)), torch.randn(shape, requires_grad=True)
    found = []
    for change in (lambda y: y.add_(1).relu_(), lambda y: (y + 1).relu()):
        y = change(ours(x))
        found.append((y, *torch.autograd.grad(y.square().sum(), (x, ours[0].lora_A, ours[0].lora_B))))
    torch.testing.assert_close(found[0], found[1])


def test_of_a_small_input_the_composed_ops_give_the_same(monkeypatch):
    ours, x = patched(linear()), torch.randn(3, 7, requires_grad=True)
    found = []
    for small in (0, 2**14):
        monkeypatch.setattr(low_rank, "SMALL", small)
        out = ours(x)
        wanted = torch.autograd.grad(out.square().sum(), (x, *(p for p in ours.parameters() if p.requires_grad)))
        found.append((uses(lambda: ours(x)), (out, *wanted)))
    assert [one for one, _ in found] == [True, False]
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-5, atol=1e-5)


def test_first_and_second_derivatives_are_right():
    for bias, base, split in itertools.product([False, True], [False, True], [False, True]):
        tensors = [torch.randn(4, 7), torch.randn(5, 7), torch.randn(5), torch.randn(3, 7), torch.randn(5, 3)]
        x, weight, c, a, b = (t.double().requires_grad_() for t in tensors)
        z = torch.randn(4, 7, dtype=torch.float64, requires_grad=True) if split else None
        weight.requires_grad_(base)

        def fused(x, weight, a, b, *rest, bias=bias, c=c, split=split):
            return low_rank.LinearWithLowRank.apply(
                x, rest[0] if split else None, weight, c if bias else None, a, b, 0.7
            )

        inputs = [x, weight, a, b, *([z] if split else [])]
        assert torch.autograd.gradcheck(fused, inputs) and torch.autograd.gradgradcheck(fused, inputs)


def test_double_backward_through_the_module():
    model, x = patched(linear()), torch.randn(4, 7, requires_grad=True)
    (first,) = torch.autograd.grad(model(x).pow(3).sum(), x, create_graph=True)
    mine = torch.autograd.grad(first.pow(2).sum(), [model[0].lora_A, model[0].lora_B])
    layer = model[0]
    y = nn.functional.linear(x, layer.weight + 2 * layer.lora_B @ layer.lora_A, layer.bias)
    (first,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
    for a, b in zip(mine, torch.autograd.grad(first.pow(2).sum(), [layer.lora_A, layer.lora_B]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(reentrant):
    model, x = patched(linear()), torch.randn(4, 7, requires_grad=True)
    wanted = [x, model[0].lora_A, model[0].lora_B]
    plain = torch.autograd.grad(model(x).pow(2).sum(), wanted)
    checkpoint(model, x, use_reentrant=reentrant).pow(2).sum().backward()
    for a, b in zip(plain, wanted, strict=True):
        torch.testing.assert_close(a, b.grad)


def test_autocast_is_that_of_peft():
    model = patched(linear())
    theirs, x = peft_like(linear(), model), torch.randn(4, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, z = model(x), theirs(x)
    assert y.dtype == z.dtype == torch.bfloat16
    torch.testing.assert_close(y, z, atol=0.05, rtol=0.02)
    mine, yours = factors(model, theirs)
    for a, b in zip(torch.autograd.grad(y.sum(), mine), torch.autograd.grad(z.sum(), yours), strict=True):
        torch.testing.assert_close(a, b, atol=0.05, rtol=0.02)


def test_function_transforms():
    model, x = patched(linear()), torch.randn(6, 4, 7)
    parameters = dict(model.named_parameters())

    def loss(parameters, x):
        return functional_call(model, parameters, x).pow(2).sum()

    each = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    together = grad(loss)(parameters, x)
    for name in parameters:
        torch.testing.assert_close(each[name].sum(0), together[name], rtol=1e-4, atol=1e-4)
    tangent = torch.randn(4, 7)
    _, out = jvp(model, (x[0],), (tangent,))
    torch.testing.assert_close(out, model(x[0] + tangent) - model(x[0]), rtol=1e-3, atol=1e-3)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x[0], tangent)
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(model(dual)).tangent, out)


class Scaled(nn.Linear):
    """A linear with a forward of its own, which the update must be added to."""

    def forward(self, x, gain=2.0):
        return super().forward(x) * gain


def test_a_subclass_with_a_forward_of_its_own_is_asked():
    torch.manual_seed(0)
    model = patched(nn.Sequential(Scaled(7, 5)))
    layer, x = model[0], torch.randn(4, 7)
    delta = x @ (2 * layer.lora_B @ layer.lora_A).T
    base = nn.functional.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), base * 2 + delta)
    torch.testing.assert_close(layer(x, gain=3.0), base * 3 + delta)


def test_a_sequence_of_training_steps_equals_peft():
    ours = patched(linear())
    theirs = peft_like(linear(), ours)
    mine, yours = factors(ours, theirs)
    x, y = torch.randn(16, 7), torch.randn(16, 5)
    optimizers = torch.optim.AdamW(mine, lr=0.05), torch.optim.AdamW(yours, lr=0.05)
    for _ in range(20):
        for model, optimizer in zip((ours, theirs), optimizers):
            optimizer.zero_grad()
            (model(x) - y).pow(2).mean().backward()
            optimizer.step()
    for a, b in zip(mine, yours, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
