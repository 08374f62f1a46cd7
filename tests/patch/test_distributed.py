"""DDP and fully_shard on top of a patched model, in a process group of one."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

import graphpatch
from tests.patch.common import LORA, patch, randomise, refused
from tests.toys import lm

IDS = torch.arange(10).view(2, 5)


@pytest.fixture(scope="module", autouse=True)
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def trained(model, handle, steps=2):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(IDS).pow(2).mean().backward()
        optimizer.step()
    return {k: getattr(t, "full_tensor", lambda t=t: t)().clone() for k, t in handle.adapter_state_dict().items()}


def reference():
    model = lm().eval()
    handle = patch(model)
    randomise(handle)
    return trained(model, handle)


def test_ddp_on_top_trains_the_same():
    model = lm().eval()
    handle = patch(model)
    randomise(handle)
    after = trained(DistributedDataParallel(model), handle)
    for name, expected in reference().items():
        torch.testing.assert_close(after[name], expected)
    handle.revert()


def test_under_ddp_it_is_refused():
    assert "DistributedDataParallel" in refused("GP507", DistributedDataParallel(lm()))


def test_fully_shard_on_top_trains_the_same_and_revert_is_refused():
    model = lm().eval()
    plain = model(IDS)
    handle = patch(model)
    randomise(handle)
    mesh = init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model.lm_head, mesh=mesh)
    fully_shard(model, mesh=mesh)
    after = trained(model, handle)
    for name, expected in reference().items():
        torch.testing.assert_close(after[name], expected)
    assert isinstance(model.lm_head, FSDPModule)
    with pytest.raises(graphpatch.ApplyError, match="fully_shard") as caught:
        handle.revert()
    assert caught.value.code == "GP521" and isinstance(model.lm_head, FSDPModule)
    with handle.disabled(), torch.no_grad():
        torch.testing.assert_close(model(IDS), plain)


def test_after_fully_shard_it_is_refused():
    model = lm()
    fully_shard(model.lm_head, mesh=init_device_mesh("cpu", (1,)))
    for text in ("patch ^lm_head with lora(rank=2)", LORA):
        with pytest.raises(graphpatch.ApplyError, match="patch before fully_shard") as caught:
            patch(model, text)
        assert caught.value.code == "GP511"
    assert type(model.lm_head).__name__ == "FSDPLinear" and not graphpatch.patches(model)
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear


@pytest.mark.parametrize("how", ["ddp", "fully_shard", "each linear"])
def test_adapters_are_chosen_on_top(how):
    model = lm().eval()
    for name in "math", "code":
        randomise(patch(model, "patch {q,v}_proj with lora(rank=2)", adapter=name))
    for layer in model.model.layers:
        layer.self_attn.v_proj.lora_B_math.data.mul_(-9)
    adapters, expected = graphpatch.adapters(model), {}
    for name in "math", "code":
        adapters.activate(name)
        expected[name] = model(IDS).detach()
    assert not torch.allclose(expected["math"], expected["code"])
    mesh, wrapped = init_device_mesh("cpu", (1,)), model
    if how == "ddp":
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    for layer in model.model.layers if how != "ddp" else ():
        fully_shard(layer if how == "fully_shard" else layer.self_attn.q_proj, mesh=mesh)
    adapters = graphpatch.adapters(wrapped)
    for name in "math", "code":
        adapters.activate(name)
        torch.testing.assert_close(wrapped(IDS), expected[name])
    rows = ["math", "code"]
    if how == "each linear":
        with pytest.raises(graphpatch.ApplyError) as caught:
            adapters.per_sample(rows).__enter__()
        assert caught.value.code == "GP547" and adapters.active == ("code",)
    else:
        with adapters.per_sample(rows):
            mixed = wrapped(IDS)
        torch.testing.assert_close(mixed, torch.stack([expected[name][at] for at, name in enumerate(rows)]))
    with pytest.raises(graphpatch.ApplyError) as caught:
        graphpatch.combine(wrapped, {"math": 1, "code": 1}, "both")
    assert caught.value.code in ("GP507", "GP511") and adapters.names == ("math", "code")
