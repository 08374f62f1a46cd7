"""A patched model under DDP and `fully_shard` on two ranks, against one process that sees both halves of the batch."""

from __future__ import annotations

import os

import pytest
import torch
from torch import multiprocessing as mp

import graphpatch
from tests.toys import lm

RULES = "patch layers[*].**:Linear with lora(rank=2, alpha=4)\nfreeze ** except @new"
IDS = torch.arange(32).reshape(4, 8) % 32
STEPS = 3


def patched() -> torch.nn.Module:
    model = lm(layers=2).eval()
    graphpatch.apply(model, graphpatch.parse(RULES))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def train(model: torch.nn.Module, ids: torch.Tensor) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(ids).square().mean().backward()
        optimizer.step()


def adapter(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    from torch.distributed.tensor import DTensor

    found = {}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            found[name.removeprefix("module.")] = whole.detach().clone()
    return found


def one_rank(rank: int, how: str, store: str, out: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model = patched()
    if how == "ddp":
        model = torch.nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    train(model, IDS.chunk(2)[rank])
    result = adapter(model)
    if rank == 0:
        torch.save(result, out)
    torch.distributed.barrier()
    # Without a way back: DDP's reducer ends the group's threads while it holds the lock that they may wait for.
    os._exit(0)


@pytest.mark.parametrize("how", ["ddp", "fully_shard"])
def test_two_ranks_train_as_one_process_does(how, tmp_path):
    out = tmp_path / "adapter.pt"
    args = (how, str(tmp_path / "store"), str(out))
    mp.start_processes(one_rank, args=args, nprocs=2, start_method="fork")
    model = patched()
    start = adapter(model)
    train(model, IDS)
    expected, found = adapter(model), torch.load(out)
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert not torch.equal(value, start[name]), name
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)
