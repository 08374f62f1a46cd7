"""`scale.output`, and mixins in general."""

from __future__ import annotations

from collections import namedtuple

import pytest
import torch
from torch import nn

import graphpatch
from graphpatch.ops.lora import Lora
from graphpatch.ops.scale import ScaleOutput as ScaleOp
from graphpatch.patch.subclass import subclass
from graphpatch.rewrites.lora import LoraLinear, LoraPlainLinear
from graphpatch.rewrites.scale import ScaleOutput

Pair = namedtuple("Pair", "value other")


class Emits(nn.Module):
    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self):
        return self.output


def scaled(output, arguments="2.0"):
    module = Emits(output)
    graphpatch.apply(nn.ModuleDict({"a": module}), graphpatch.parse(f"patch a with scale.output({arguments})"))
    return module()


def test_a_tensor_or_the_first_of_several():
    one = torch.ones(2)
    assert torch.equal(scaled(one), one * 2)
    assert scaled((one, 3))[1] == 3 and torch.equal(scaled((one, 3))[0], one * 2)
    pair = scaled(Pair(one, "x"))
    assert type(pair) is Pair and torch.equal(pair.value, one * 2) and pair.other == "x"


def test_another_output_is_one_clear_error():
    with pytest.raises(graphpatch.ApplyError, match="cannot change a dict"):
        scaled({"a": torch.ones(1)})


def test_an_embedding_scaled_as_gemma_scales_it():
    x = torch.randn(64, dtype=torch.bfloat16)
    by = 3072**0.5
    once = (x.double() * by).to(torch.bfloat16)
    gemma = x * torch.tensor(by, dtype=torch.bfloat16)
    assert torch.equal(scaled(x, str(by)), once)
    assert torch.equal(scaled(x, f"{by}, rounded=true"), gemma) and not torch.equal(once, gemma)


def test_levels_of_mixins_are_those_of_their_ops():
    assert LoraLinear.level == Lora.level == 10 and ScaleOutput.level == ScaleOp.level == 50


def test_one_class_whatever_the_order():
    cls = subclass(nn.Linear, (ScaleOutput, LoraLinear))
    assert cls is subclass(nn.Linear, (LoraLinear, ScaleOutput, LoraLinear))
    assert cls.__mro__[1:4] == (ScaleOutput, LoraPlainLinear, LoraLinear)
    assert subclass(nn.Linear, ()) is nn.Linear
