"""`insert_before`: any op that acts on outputs, on a module's input."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphpatch

from ..patch.common import patch, refused, state
from .test_every_op import IDS, made


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.gate = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x, other=None):
        return self.up(x) * self.gate(x if other is None else other)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Gated()

    def forward(self, x, **options):
        return self.block(x=x, **options)


def test_equal_to_the_formula_forward_and_backward():
    torch.manual_seed(0)
    net, x = Net().double(), torch.randn(3, 6).double().requires_grad_()
    before = state(net)
    done = patch(
        net,
        'patch block with insert_before("input", scale.output(3.0)) then insert_before("input", norm.post(eps=1e-5, dim=6))'
        '\npatch up with insert_before("input", softcap.output(0.7)) then insert_before("input", tap("in"))',
    )
    with torch.no_grad():
        net.block.before_norm_post.post_norm.weight.normal_()
    weight = net.block.before_norm_post.post_norm.weight
    with graphpatch.taps(net) as seen:
        y = net(x)
    normed = F.rms_norm(3 * x, (6,), weight, 1e-5)
    gate = F.linear(normed, net.block.gate.weight, net.block.gate.bias)
    capped = 0.7 * torch.tanh(normed / 0.7)
    wanted = F.linear(capped, net.block.up.weight, net.block.up.bias) * gate
    assert torch.allclose(y, wanted, atol=1e-12)
    assert torch.allclose(seen["in"][0], capped)  # the linear is given what was last
    over = [x, weight, net.block.up.weight]
    ours, theirs = torch.autograd.grad(y.sum(), over), torch.autograd.grad(wanted.sum(), over)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(ours, theirs))
    done.revert()
    assert state(net) == before
    against = 'insert_before("input", softcap.output(0.7)) then insert_before("input", scale.output(2.0))'
    refused("GP416", net, f"patch up with {against}")


def test_the_same_tensor_is_changed_in_each_of_its_places():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x, memory = torch.randn(2, 5, 8), torch.randn(2, 3, 8)
    own, cross = attention(2 * x, 2 * x, 2 * x)[0], attention(2 * x, memory, memory)[0]
    patch(attention, 'patch ^ with insert_before("input", scale.output(2.0))')
    assert torch.allclose(attention(x, x, x)[0], own, atol=1e-6)
    assert torch.allclose(attention(x, value=memory, key=memory)[0], cross, atol=1e-6)


def test_the_fused_encoder_does_not_pass_it_by():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    encoder, x = nn.TransformerEncoder(layer, 2).eval(), torch.randn(2, 5, 16)
    encoder.requires_grad_(False)
    plain = encoder(x)
    done = patch(encoder, 'patch layers[*].linear1 with insert_before("input", scale.output(0.5))')
    changed = encoder(x)
    with torch.no_grad():
        for each in encoder.layers:
            each.linear1.weight.mul_(0.5)
    done.revert()
    assert not torch.allclose(changed, plain) and torch.allclose(changed, encoder(x), atol=1e-5)


def test_lora_on_the_module_sees_the_changed_input_in_either_order():
    text = [
        'patch q_proj with insert_before("input", norm.post(kind="layer", dim=32))',
        "patch q_proj with lora(rank=2)",
    ]
    outputs = []
    for first, second in (text, text[::-1]):
        model = made()
        before = state(model)
        one, two = patch(model, first), patch(model, second)
        torch.manual_seed(1)
        with torch.no_grad():
            for name, parameter in sorted(model.named_parameters()):
                if "lora_" in name or "post_norm" in name:
                    parameter.normal_(std=0.3)
            outputs.append(model(IDS).logits)
        one.revert()
        two.revert()
        assert state(model) == before
    assert torch.equal(*outputs)


def test_generation_with_a_cache_and_compiled_whole():
    model = made()
    patch(model, 'patch self_attn with insert_before("input", adapter.bottleneck(dim=4))')
    for layer in model.model.layers:
        nn.init.normal_(layer.self_attn.before_adapter_bottleneck.bottleneck.up.weight)
    tokens = model.generate(IDS, max_new_tokens=6, do_sample=False, eos_token_id=None)
    whole = model(tokens).logits[:, 7:-1].argmax(-1)
    assert torch.equal(whole, tokens[:, 8:])
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.allclose(compiled(input_ids=IDS).logits, model(IDS).logits, atol=1e-6)


def test_what_has_no_such_input():
    assert "numbers of tokens" in refused("GP483", made(), 'patch embed_tokens with insert_before("input", tap("h"))')
    refused("GP410", made(), 'patch layers with insert_before("input", tap("h"))')
    model = made()
    patch(model, 'patch ^ with insert_before("input", scale.output(2.0))')
    with pytest.raises(graphpatch.Error, match="needs a floating-point tensor as `input_ids`") as caught:
        model(IDS)
    assert caught.value.code == "GP484"
