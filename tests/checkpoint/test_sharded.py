"""A patched model sharded by fully_shard saves all of its adapter, and takes it back; in a process group of one."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import graphpatch
from tests.checkpoint.common import IDS, NORMS, saved
from tests.patch.common import randomise
from tests.toys import lm


@pytest.fixture(scope="module", autouse=True)
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_saved_and_loaded_while_sharded(tmp_path):
    folder, after = saved(tmp_path / "a", NORMS)
    model = lm().eval()
    patch = graphpatch.apply(model, graphpatch.parse(NORMS))
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    assert type(model.lm_head.lora_A.data).__name__ == "DTensor"

    graphpatch.load_weights(patch, folder)
    assert torch.equal(model(IDS), after)

    graphpatch.save_adapter(patch, tmp_path / "b")
    randomise(patch)
    plain = lm().eval()
    graphpatch.load_adapter(plain, tmp_path / "b")
    assert torch.equal(plain(IDS), after)
