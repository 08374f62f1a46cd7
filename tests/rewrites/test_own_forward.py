"""LoRA on subclasses of `nn.Linear` whose forward is their own."""

import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4GroupedLinear
from transformers.models.falcon.modeling_falcon import FalconLinear

import graphpatch
from graphpatch import ApplyError

RULES = "patch ^0 with lora(rank=2, alpha=3)\nfreeze ** except @new"


class Doubled(nn.Linear):
    def forward(self, hidden_states):
        return 2 * super().forward(hidden_states)


class InFloat(nn.Linear):
    """Computes in float32, whatever it is given."""

    def forward(self, x):
        return linear(x.float(), self.weight.float(), self.bias.float()).to(x.dtype)


class Sequences(nn.Linear):
    """Takes sequences alone."""

    def forward(self, x):
        batch, length, features = x.shape
        return super().forward(x.view(batch * length, features)).view(batch, length, -1)


class Router(nn.Linear):
    def forward(self, x):
        return super().forward(x).topk(2)


class Dropping(nn.Linear):
    def forward(self, x):
        return super().forward(nn.functional.dropout(x, 0.5, self.training))


def patched(module: nn.Module) -> tuple[nn.Sequential, graphpatch.Patch]:
    torch.manual_seed(0)
    model = nn.Sequential(module)
    patch = graphpatch.apply(model, graphpatch.parse(RULES))
    for parameter in patch.trainable_parameters():
        nn.init.normal_(parameter)
    return model, patch


def update(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    a, b = module.lora_A.to(x.dtype), module.lora_B.to(x.dtype)
    return 1.5 * (x @ a.T @ b.T)


def test_the_update_stands_beside_what_the_class_makes():
    model, _ = patched(Doubled(6, 4))
    x = torch.randn(3, 6, requires_grad=True)
    output = model[0](hidden_states=x)
    expected = 2 * linear(x, model[0].weight, model[0].bias) + update(model[0], x)
    torch.testing.assert_close(output, expected)
    got = torch.autograd.grad(output.sum(), [x, model[0].lora_A, model[0].lora_B])
    for one, other in zip(got, torch.autograd.grad(expected.sum(), [x, model[0].lora_A, model[0].lora_B])):
        torch.testing.assert_close(one, other)


def test_and_is_not_merged_where_that_would_be_another_model():
    model, patch = patched(Doubled(6, 4))
    x, weight = torch.randn(3, 6), model[0].weight.detach().clone()
    before = model(x)
    with pytest.raises(ApplyError, match="GP531") as refused:
        patch.merge()
    assert "the forward of Doubled makes more of its weight" in str(refused.value)
    assert not patch.merged and torch.equal(model[0].weight, weight) and torch.equal(model(x), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("cls", [FalconLinear, InFloat, Dropping])
def test_it_is_merged_where_the_class_computes_the_product(cls, dtype):
    model, patch = patched(cls(256, 32).to(dtype))
    x = torch.randn(3, 256, dtype=dtype)
    if cls is Dropping:
        model.eval()
    expected = linear(x.double(), model[0].weight.double(), model[0].bias.double()) + update(model[0], x.double())
    modes = [part.training for part in model.modules()]
    patch.merge()
    assert [part.training for part in model.modules()] == modes
    near = 0.03 if dtype == torch.bfloat16 else 1e-5
    assert (model(x) - expected).abs().max() <= near * expected.abs().max()


def test_how_it_is_tried_is_not_the_callers_precision():
    _, patch = patched(FalconLinear(256, 32))
    with torch.autocast("cpu", torch.bfloat16):
        patch.merge()
    assert patch.merged


def test_one_that_cannot_be_tried_on_two_rows_is_not_merged():
    model, patch = patched(Sequences(6, 4))
    with pytest.raises(ApplyError, match="GP531"):
        patch.merge()
    x = torch.randn(2, 3, 6)
    torch.testing.assert_close(model(x), linear(x, model[0].weight, model[0].bias) + update(model[0], x))


@pytest.mark.parametrize(
    "make, x, why",
    [
        (lambda: Router(6, 4), (3, 6), "it makes a topk, and an update is a tensor"),
        (
            lambda: DeepseekV4GroupedLinear(8, 12, 4),
            (2, 3, 4, 8),
            "it makes (2, 3, 4, 3), and of an update (2, 3, 4, 12)",
        ),
    ],
)
def test_an_output_that_nothing_can_be_added_to_is_told(make, x, why):
    model, patch = patched(make())
    with pytest.raises(ApplyError, match="GP552") as refused:
        model(torch.randn(x))
    assert why in str(refused.value)
    patch.revert()
    model(torch.randn(x))
