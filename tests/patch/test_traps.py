"""Each way in which changing a class in place could go wrong in silence, and what happens instead."""

from __future__ import annotations

import copy
import functools
import warnings

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module, remove_hook_from_module
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import graphpatch
from tests.patch.common import LORA, patch, randomise, refused, state
from tests.toys import lm

IDS = torch.arange(10).view(2, 5)
X = torch.ones(1, 4)


def linear() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4))


# ── an instance's own forward ──


def test_an_unknown_forward_on_the_instance_is_refused():
    model = linear()
    model[0].forward = lambda x: x
    message = refused("GP501", model)
    assert "`0`" in message and "<lambda>" in message


def test_a_hook_of_accelerate_calls_the_rewrite():
    model = linear()
    plain = model(X)
    add_hook_to_module(model[0], ModelHook())
    handle = patch(model)
    randomise(handle)
    reference = linear()
    randomise(patch(reference))
    assert torch.equal(model(X), reference(X)) and not torch.equal(model(X), plain)
    assert handle.probe(X) == []
    handle.revert()
    assert torch.equal(model(X), plain)
    remove_hook_from_module(model[0])
    assert torch.equal(model(X), plain)


def test_a_hook_that_came_and_went_left_a_forward_that_is_rebound():
    model = linear()
    add_hook_to_module(model[0], ModelHook())
    remove_hook_from_module(model[0])
    assert "forward" in model[0].__dict__
    handle = patch(model)
    assert handle.probe(X) == []
    handle.revert()
    assert model(X) is not None and model[0].forward.__func__ is nn.Linear.forward


def test_hooked_after_patching_and_reverted_under_the_hook():
    model = linear()
    plain = model(X)
    handle = patch(model)
    randomise(handle)
    patched = model(X)
    add_hook_to_module(model[0], ModelHook())
    assert torch.equal(model(X), patched) and handle.probe(X) == []
    handle.revert()
    assert torch.equal(model(X), plain)


def test_a_forward_wrapped_after_patching_stands_in_the_way_of_revert():
    model = linear()
    handle = patch(model)
    model[0].forward = functools.partial(model[0].forward)
    with pytest.raises(graphpatch.ApplyError, match="wrapped since") as caught:
        handle.revert()
    assert caught.value.code == "GP521"
    del model[0].forward
    handle.revert()


def test_offloaded_modules_are_refused():
    model = linear()
    add_hook_to_module(model[0], AlignDevicesHook(execution_device="cpu", offload=True, weights_map={}))
    with pytest.raises(graphpatch.ApplyError) as caught:
        patch(model)
    assert caught.value.code == "GP512"


# ── parametrizations ──


def test_parametrised_first_and_undone_in_either_order():
    for revert_first in (True, False):
        model = linear()
        parametrizations.weight_norm(model[0])
        cls, plain = type(model[0]), model(X)
        handle = patch(model, "patch ^0 with lora(rank=2)")
        assert torch.equal(model(X), plain)
        randomise(handle)
        patched, twin = model(X), copy.deepcopy(model)
        assert not torch.equal(patched, plain) and torch.equal(twin(X), patched)
        if revert_first:
            handle.revert()
            assert type(model[0]) is cls and torch.equal(model(X), plain)
            parametrize.remove_parametrizations(model[0], "weight")
        else:
            parametrize.remove_parametrizations(model[0], "weight")
            torch.testing.assert_close(model(X), patched)
            handle.revert()
        assert type(model[0]) is nn.Linear
        torch.testing.assert_close(model(X), plain)


def test_parametrised_after_patching():
    model = linear()
    handle = patch(model)
    randomise(handle)
    patched = model(X)
    parametrizations.spectral_norm(model[0])
    normed = model.eval()(X)
    assert not torch.equal(normed, patched)
    handle.revert()
    bare = linear()
    parametrizations.spectral_norm(bare[0])
    bare[0].load_state_dict(model[0].state_dict())
    torch.testing.assert_close(model(X), bare.eval()(X))
    parametrize.remove_parametrizations(model[0], "weight")
    assert type(model[0]) is nn.Linear


# ── modules whose weight is read past them ──


def encoder() -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.TransformerEncoder(layer, 2).eval()


def test_children_of_multihead_attention_are_refused():
    message = refused("GP503", encoder(), "patch out_proj with lora(rank=2)")
    assert "never calls the module" in message
    refused("GP503", encoder(), "patch out_proj with scale.output(2.0)")


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_the_fast_path_of_an_encoder_layer_is_left(padded):
    model, x = encoder(), torch.randn(2, 5, 8)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if padded else None
    with torch.no_grad():
        plain = model(x, src_key_padding_mask=mask)
        before = state(model)
        handle = patch(model, "patch linear1 with lora(rank=2) then scale.output(2.0)")
        randomise(handle)
        patched = model(x, src_key_padding_mask=mask)
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            expected = model(x, src_key_padding_mask=mask)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
        keep = ~mask if padded else ...
        torch.testing.assert_close(patched[keep], expected[keep], atol=1e-5, rtol=1e-5)
        assert (patched - plain)[keep].abs().max() > 1e-3
        assert handle.probe({"src": x, "src_key_padding_mask": mask}) == []
        handle.revert()
        assert state(model) == before
        assert torch.equal(model(x, src_key_padding_mask=mask), plain)


def test_two_patches_leave_the_fast_path_until_both_are_gone():
    model, x = encoder(), torch.randn(2, 5, 8)
    one = patch(model, 'patch linear1 with lora(rank=2, adapter="one")')
    two = patch(model, 'patch linear1 with lora(rank=2, adapter="two")')
    randomise(two)
    one.revert()
    with torch.no_grad():
        inference = model(x)
    torch.testing.assert_close(inference, model(x), atol=1e-5, rtol=1e-5)
    assert two.probe(x) == []


# ── initialisation and loading ──


def test_to_empty_and_reset_parameters_leave_no_garbage():
    with torch.device("meta"):
        model = linear()
    patch(model)
    model.to_empty(device="cpu")
    for tensor in (model[0].lora_A, model[0].lora_B):
        tensor.data.fill_(float("nan"))
    model[0].reset_parameters()
    assert model[0].lora_B.count_nonzero() == 0
    assert 0 < model[0].lora_A.abs().max() <= 4**-0.5 and model[0].weight.isfinite().all()


def test_lazy_modules_are_refused_until_they_know_their_shape():
    model = nn.Sequential(nn.LazyLinear(4))
    with pytest.raises(graphpatch.PlanError, match="does not know its shape yet"):
        patch(model)
    model(X)
    assert len(patch(model).changes) == 1


def test_a_quantised_base():
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)).eval()
    quantize_(model, Int8WeightOnlyConfig())
    x = torch.randn(2, 32)
    plain = model(x)
    handle = patch(model)
    assert model[0].lora_A.dtype == torch.float32 and torch.equal(model(x), plain)
    randomise(handle)
    model(x).sum().backward()
    assert all(p.grad.isfinite().all() for p in handle.trainable_parameters())
    handle.revert()
    assert torch.equal(model(x), plain)


def test_an_overridden_setattr_and_register_parameter_are_respected():
    class Careful(nn.Linear):
        registered: tuple = ()

        def __setattr__(self, name, value):
            if name == "__class__":
                raise AttributeError(name)
            super().__setattr__(name, value)

        def register_parameter(self, name, param):
            type(self).registered += (name,)
            super().register_parameter(name, param)

    model = nn.Sequential(Careful(4, 4))
    handle = patch(model, "patch ^0 with lora(rank=2)")
    assert Careful.registered[-2:] == ("lora_A", "lora_B") and handle.probe(X) == []
    handle.revert()
    assert type(model[0]) is Careful


def test_torchscript_is_refused():
    model = nn.Sequential(torch.jit.script(nn.Linear(4, 4)))
    with pytest.raises(graphpatch.Error) as caught:
        patch(model, "patch ^0 with scale.output(2.0)")
    assert caught.value.code == "GP513"


# ── wrapped and sharded models ──


class DistributedDataParallel(nn.Module):
    """By name: what a process group is not needed for."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def test_inside_ddp_it_is_refused_with_the_fix():
    message = refused("GP507", DistributedDataParallel(lm()))
    assert "apply to the inner model, then wrap" in message
    inside = nn.ModuleDict({"a": DistributedDataParallel(nn.Linear(2, 2)), "b": nn.Linear(2, 2)})
    refused("GP507", inside)
    assert len(patch(inside, "patch b with lora(rank=1)").changes) == 1


def test_a_patch_at_the_root_of_a_submodule_is_found_from_above():
    model = lm()
    handle = patch(model.model, LORA)
    assert graphpatch.patches(model) == [handle]
    assert handle.probe(IDS) == []
