"""`cast`, against the module itself in that dtype."""

from __future__ import annotations

import copy
import pickle

import torch
from torch import nn

from ..patch.common import patch, refused, state


def made() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(9, 8), nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)), nn.Linear(8, 5)
    ).bfloat16()


def test_as_the_module_in_that_dtype():
    net, ids = made(), torch.tensor([[1, 2, 8]])
    wide, before = copy.deepcopy(net), state(net)
    wide[1].float()
    both = patch(net, 'patch "1" with cast("float32")\npatch "2" with cast("float64", keep=true)')
    y = net(ids)
    inner = wide[1](wide[0](ids).float()).bfloat16()
    wanted = copy.deepcopy(wide[2]).double()(inner.double())
    assert y.dtype == torch.float64 and torch.equal(y, wanted)
    y.sum().backward()
    wanted.sum().backward()
    for ours, theirs in zip(net[1].parameters(), wide[1].parameters()):
        assert ours.grad.dtype == torch.bfloat16
        torch.testing.assert_close(ours.grad, theirs.grad.bfloat16())
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(other(ids), y)
    torch.testing.assert_close(torch.compile(copy.deepcopy(net), backend="eager", fullgraph=True)(ids), y)
    with both.disabled():
        assert net(ids).dtype == torch.bfloat16
    net.zero_grad()
    both.revert()
    assert state(net) == before


def test_what_stands_inside_and_outside():
    net, x = nn.Sequential(nn.Linear(4, 4)).bfloat16(), torch.randn(2, 4).bfloat16()
    patch(net, 'patch :Linear with lora(rank=2, alpha=2) then cast("float32") then scale.output(2.0)')
    with torch.no_grad():
        net[0].lora_B.normal_()
    lin = net[0]
    full = x.float() @ lin.weight.float().T + lin.bias.float()
    full = full + (x.float() @ lin.lora_A.float().T) @ lin.lora_B.float().T
    got = net(x)
    assert got.dtype == torch.bfloat16 and torch.equal(got, full.bfloat16() * 2)
    refused("GP204", net, 'patch :Linear with cast("int8")')
    refused("GP410", nn.ModuleDict({"l": nn.ModuleList([nn.Linear(2, 2)])}), 'patch l with cast("float32")')
