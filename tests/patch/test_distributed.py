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
