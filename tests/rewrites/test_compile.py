"""`compile` on modules of a model."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from ..patch.common import patch, refused, state


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x, *, again=False):
        y = self.down(torch.relu(self.up(x)))
        return y + x if again else y


class Breaking(nn.Module):
    def forward(self, x):
        print(end="")
        torch._dynamo.graph_break()
        return x + 1


def test_compiled_by_themselves_once_for_all():
    torch.manual_seed(0)
    torch._dynamo.reset()
    net, x = nn.Sequential(*(Block() for _ in range(4))), torch.randn(2, 8, requires_grad=True)
    before, wanted = state(net), net(x)
    wanted.sum().backward()
    grads, x.grad = [p.grad.clone() for p in net.parameters()], None
    net.zero_grad()
    graphs = []

    def counted(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.register_backend(counted, name="counted")
    compiled = patch(net, 'patch :Block with scale.output(1.0) then compile(backend="counted", fullgraph=true)')
    y = net(x)
    y.sum().backward()
    torch.testing.assert_close(y, wanted)
    for parameter, grad in zip(net.parameters(), grads):
        torch.testing.assert_close(parameter.grad, grad)
    assert len(graphs) == 1
    torch.testing.assert_close(net[0](x, again=True), net[0](x) + x)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        torch.testing.assert_close(other(x), y)
    torch.testing.assert_close(torch.compile(copy.deepcopy(net), backend="eager", fullgraph=True)(x), y)
    number = len(graphs)
    with compiled.disabled():
        torch.testing.assert_close(net(x), y)
    assert len(graphs) == number
    net.zero_grad()
    compiled.revert()
    assert state(net) == before


def test_what_cannot_be():
    net = nn.Sequential(Breaking(), nn.ModuleList([nn.Linear(2, 2)]))
    refused("GP583", net, 'patch :Breaking with compile(backend="inducter")')
    refused("GP583", net, 'patch :Breaking with compile(backend="eager", mode="max-autotune")')
    refused("GP410", net, "patch :ModuleList with compile()")
    patch(net, 'patch :Breaking with compile(backend="eager", fullgraph=true)')
    with pytest.raises(torch._dynamo.exc.Unsupported):
        net[0](torch.ones(2))
