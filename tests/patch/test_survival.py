"""What a patched model goes through in its life, and comes out of whole."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import graphpatch
from tests.patch.common import patch, randomise
from tests.toys import lm

IDS = torch.arange(10).view(2, 5)
TEXT = """
patch {q,k}_proj with lora(rank=2) then scale.output(2.0)
patch lm_head with lora(rank=2, dropout=0.5)
patch :*RMSNorm with set(eps=0.5)
freeze ** except @new
"""


@pytest.fixture
def patched():
    model = lm().eval()
    expected = model(IDS)
    handle = patch(model, TEXT)
    randomise(handle)
    return model, handle, expected


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("trip", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved])
def test_a_copy_computes_the_same_and_reverts(patched, trip):
    model, _, expected = patched
    twin = trip(model)
    assert torch.equal(twin(IDS), model(IDS))
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
    assert [(n, p.requires_grad) for n, p in twin.named_parameters()] == [
        (n, p.requires_grad) for n, p in model.named_parameters()
    ]
    (handle,) = graphpatch.patches(twin)
    assert handle.probe(IDS) == []
    handle.revert()
    assert torch.equal(twin(IDS), expected)
    assert [m.__dict__.keys() for m in twin.modules()] == [m.__dict__.keys() for m in lm().modules()]
    assert all(p.requires_grad for p in twin.parameters())


def test_classes_that_reduce_in_ways_of_their_own():
    for cls in (Constructed, Stateful, Forwarding):
        module = cls(3)
        patch(nn.ModuleDict({"a": module}), "patch a with lora(rank=2)")
        for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert type(twin) is type(module) and twin.extra == 7 and twin.lora_A.shape == (2, 3)
            assert torch.equal(twin(torch.ones(1, 3)), module(torch.ones(1, 3)))


class Constructed(nn.Linear):
    def __new__(cls, size, *rest):
        return super().__new__(cls)

    def __init__(self, size):
        super().__init__(size, size)
        self.extra = 7

    def __reduce__(self):
        return type(self), (self.in_features,), self.__dict__


class Stateful(nn.Linear):
    def __init__(self, size):
        super().__init__(size, size)
        self.extra = 7

    def __getstate__(self):
        return {**self.__dict__, "extra": 6}

    def __setstate__(self, state):
        super().__setstate__({**state, "extra": state["extra"] + 1})


class Forwarding(nn.Linear):
    def __init__(self, size):
        super().__init__(size, size)

    def __getattr__(self, name):
        return 7 if name == "extra" else super().__getattr__(name)


def test_state_dicts_go_both_ways(patched):
    model, handle, _ = patched
    plain = lm()
    missing = plain.load_state_dict(model.state_dict(), strict=False)
    assert missing.missing_keys == [] and set(missing.unexpected_keys) == set(handle.adapter_state_dict())
    back = model.load_state_dict(lm().state_dict(), strict=False)
    assert back.unexpected_keys == [] and set(back.missing_keys) == set(handle.adapter_state_dict())
    other = lm().eval()
    patch(other, TEXT)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(IDS), model(IDS))


def test_moved_to_another_dtype(patched):
    model, handle, _ = patched
    model.to(torch.bfloat16)
    assert {t.dtype for t in handle.adapter_state_dict().values()} == {torch.bfloat16}
    assert model(IDS).dtype == torch.bfloat16 and model(IDS).isfinite().all()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    def grads(wrapped):
        model = lm().eval()
        handle = patch(model, "patch {q,v}_proj with lora(rank=2)\nfreeze ** except @new | embed_tokens")
        randomise(handle)
        if wrapped:
            for layer in model.model.layers:
                layer.forward = _checkpointed(layer.forward, reentrant)
        model(IDS).pow(2).sum().backward()
        return [p.grad for p in handle.trainable_parameters()]

    for one, other in zip(grads(True), grads(False), strict=True):
        torch.testing.assert_close(one, other)


def _checkpointed(forward, reentrant):
    return lambda x: checkpoint(forward, x, use_reentrant=reentrant)


def test_compiled_whole_then_patched_again_then_reverted():
    """fullgraph compilation follows every change of class, through AOT autograd."""
    torch._dynamo.reset()
    block = lm(layers=1, hidden=8).model.layers[0].self_attn
    x = torch.randn(2, 3, 8, requires_grad=True)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    expected = compiled(x)
    torch.testing.assert_close(expected, block(x))
    handle = patch(block, "patch {q,k}_proj with lora(rank=2) then scale.output(2.0)\nfreeze ** except @new")
    randomise(handle)
    torch.testing.assert_close(compiled(x), block(x))
    grads = torch.autograd.grad(compiled(x).sum(), handle.trainable_parameters())
    for one, other in zip(grads, torch.autograd.grad(block(x).sum(), handle.trainable_parameters()), strict=True):
        torch.testing.assert_close(one, other)
    with handle.disabled():
        torch.testing.assert_close(compiled(x), expected)
    assert handle.probe(x) == []
    handle.revert()
    torch.testing.assert_close(compiled(x), expected)


def test_exported(patched):
    model, _, _ = patched
    program = torch.export.export(model, (IDS,))
    torch.testing.assert_close(program.module()(IDS), model(IDS))


def test_traced(patched):
    model, _, _ = patched
    torch.testing.assert_close(torch.jit.trace(model, (IDS,))(IDS), model(IDS))


def test_symbolically_traced_it_is_a_leaf():
    model = nn.Sequential(nn.Linear(2, 2))
    patch(model, "patch :Linear with lora(rank=1)")
    graph = torch.fx.symbolic_trace(model).graph
    assert [n.op for n in graph.nodes] == ["placeholder", "call_module", "output"]


def test_hooks_from_before_and_after_see_the_patched_output():
    model = nn.Sequential(nn.Linear(2, 2))
    seen = []
    model[0].register_forward_hook(lambda m, a, out: seen.append(out))
    handle = patch(model, "patch :Linear with lora(rank=1)")
    randomise(handle)
    model[0].register_forward_hook(lambda m, a, out: seen.append(out))
    out = model(torch.ones(1, 2))
    assert torch.equal(seen[0], out) and torch.equal(seen[1], out)


def test_optimizers_made_before_keep_their_parameters():
    model = lm()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [id(p) for p in optimizer.param_groups[0]["params"]]
    handle = patch(model, "patch q_proj with lora(rank=2)")
    handle.revert()
    assert before == [id(p) for p in model.parameters()]
