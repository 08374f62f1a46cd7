"""More than one process: DDP by subprocess, fork and spawn, and FSDP2, against one process on the same batches."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from .common import clean_environment
from .forked import Forked

PRELUDE = """
import json, shutil, sys, torch
from pathlib import Path
import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
import graphpatch
from graphpatch.lightning import LoRA, ModelTransform, ResumableDataLoader, load_from_checkpoint
from tests.lightning.common import Module, Net, data, factors, trainer

torch.set_num_threads(1)
folder = Path(sys.argv[1])
def lora(): return ModelTransform(graphpatch.parse(RULES))
RULES = "patch linear_qkv | linear_proj with lora(rank=2)\\nfreeze ** except @new"
def seeded():
    torch.manual_seed(5)
def said(**facts):
    if int(__import__("os").environ.get("LOCAL_RANK", 0)) == 0:
        (folder / "said.json").write_text(json.dumps(facts))
def loader(batch):
    return torch.utils.data.DataLoader(data(8).dataset, batch_size=batch)
class Plain(Module):
    def __init__(self, **k): super().__init__(noise=False, **k)
    def training_step(self, batch, index):
        loss = super().training_step(batch, index)
        self.losses[-1] = self.all_gather(loss.detach()).mean().item()
        return loss
"""


def run(folder: Path, script: str, ranks: int = 1) -> dict[str, Any]:
    """What the script says, on ranks that are there already."""
    start(folder, script, ranks).wait()
    return json.loads((folder / "said.json").read_text())


def start(folder: Path, script: str, ranks: int = 1) -> Forked:
    folder.mkdir(parents=True, exist_ok=True)
    return Forked(PRELUDE + script, [str(folder)], ranks)


def run_as_a_file(folder: Path, script: str) -> dict[str, Any]:
    """What the script says, as a file of its own, which launchers run again."""
    file = folder / "script.py"
    file.write_text(PRELUDE + "if __name__ == '__main__':\n" + "".join(f"    {line}\n" for line in script.splitlines()))
    root = str(Path(__file__).parents[2])
    environment = {**clean_environment(), "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(file), str(folder)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads((folder / "said.json").read_text())


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> list[float]:
    """The losses of one process over batches of eight, six epochs of four."""
    script = """
seeded(); module = Plain()
trainer(folder, lora(), max_epochs=3).fit(module, loader(8))
said(losses=module.losses)
"""
    return run(tmp_path_factory.mktemp("alone"), script)["losses"]


def close(ours: list[float], theirs: list[float]) -> bool:
    return len(ours) == len(theirs) and torch.allclose(torch.tensor(ours), torch.tensor(theirs), atol=1e-5)


def test_ddp_trains_as_one_process_and_resumes(tmp_path, alone):
    script = """
class Interleaved(torch.utils.data.Sampler):
    # The two halves of each batch of eight, one a rank.
    def __init__(self, rank): self.rank = rank
    def __iter__(self): return iter(i for b in range(4) for i in range(8 * b + 4 * self.rank, 8 * b + 4 * self.rank + 4))
    def __len__(self): return 16
rank = int(__import__("os").environ.get("LOCAL_RANK", 0))
halves = lambda: torch.utils.data.DataLoader(data(8).dataset, batch_size=4, sampler=Interleaved(rank))
options = dict(strategy="ddp", devices=2, enable_checkpointing=True, use_distributed_sampler=False)
saver = ModelCheckpoint(folder, save_last=True)
seeded(); first = Plain()
trainer(folder, lora(), saver, max_epochs=2, **options).fit(first, halves())
held = torch.load(folder / "last.ckpt", weights_only=True)
second = Plain()
trainer(folder, lora(), max_epochs=3, **{**options, "enable_checkpointing": False}).fit(second, halves(), ckpt_path=folder / "last.ckpt")
loaded = load_from_checkpoint(Plain, folder / "last.ckpt")
said(losses=first.losses + second.losses, keys=sorted(held["state_dict"]), factors=sorted(factors(second)),
     ranks=len(held["graphpatch"]["random"]["states"]), loaded=sorted(factors(loaded)))
"""
    told = run(tmp_path, script, ranks=2)
    assert close(told["losses"], alone)
    assert told["keys"] == told["factors"] == told["loaded"] and len(told["keys"]) == 8 and told["ranks"] == 2


@pytest.mark.parametrize("strategy", ["ddp_fork", "ddp_spawn"])
def test_what_a_forked_or_spawned_process_trained_is_in_the_parent_s_module(tmp_path, strategy):
    script = f"""
seeded(); module, lora = Plain(), lora()
trainer(folder, lora, strategy="{strategy}", devices=2, max_epochs=1).fit(module, loader(4))
lora(module)
trained = all(bool(p.count_nonzero()) for n, p in module.named_parameters() if "lora_B" in n)
said(factors=len(factors(module)), trained=trained, patches=len(graphpatch.patches(module)))
"""
    assert run_as_a_file(tmp_path, script) == {"factors": 8, "trained": True, "patches": 1}


FSDP = """
class Sharded(Plain):
    def __init__(self, early=True, born="cpu", **k):
        super().__init__(built="configure_model", **k)
        self.early, self.born = early, born
    def configure_model(self):
        if self.net is not None: return
        with torch.device(self.born): self.build()
        if self.early: self.model_transform(self.net)
        from torch.distributed.fsdp import fully_shard
        mesh = self.device_mesh["data_parallel"]
        for layer in self.net.layers: fully_shard(layer, mesh=mesh)
        fully_shard(self.net, mesh=mesh)
rank = int(__import__("os").environ.get("LOCAL_RANK", 0))
class Interleaved(torch.utils.data.Sampler):
    def __iter__(self): return iter(i for b in range(4) for i in range(8 * b + 4 * rank, 8 * b + 4 * rank + 4))
    def __len__(self): return 16
halves = lambda: torch.utils.data.DataLoader(data(8).dataset, batch_size=4, sampler=Interleaved())
def strategy(sharded): return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=sharded)
"""


@pytest.mark.parametrize("sharded", [False, True])
def test_fsdp2_trains_as_one_process_and_resumes(tmp_path, alone, sharded):
    script = f"""
{FSDP.strip()}
options = dict(devices=2, use_distributed_sampler=False)
def made():
    t = lora(); return t, Sharded(model_transform=t)
seeded(); t, first = made()
saver = ModelCheckpoint(folder, save_last=True)
trainer(folder, t, saver, strategy=strategy({sharded}), max_epochs=2, enable_checkpointing=True, **options).fit(first, halves())
t, second = made()
trainer(folder, t, strategy=strategy({sharded}), max_epochs=3, **options).fit(second, halves(), ckpt_path=folder / "last.ckpt")
other = ModelTransform(graphpatch.parse(RULES.replace("rank=2", "rank=3")))
try:
    trainer(folder, other, strategy=strategy({sharded}), max_epochs=3, **options).fit(
        Sharded(model_transform=other), halves(), ckpt_path=folder / "last.ckpt")
except graphpatch.Error as error:
    refused = str(error)
short = folder / "short.ckpt"
if rank == 0:
    if {sharded}: shutil.copytree(folder / "last.ckpt", short)
    meta = torch.load(folder / "last.ckpt" / "meta.pt" if {sharded} else folder / "last.ckpt", weights_only=True)
    gone = meta["graphpatch"]["names"].pop()
    if not {sharded}: del meta["state_dict"][gone]
    torch.save(meta, short / "meta.pt" if {sharded} else short)
torch.distributed.barrier()
t, third = made()
try:
    trainer(folder, t, strategy=strategy({sharded}), max_epochs=3, **options).fit(third, halves(), ckpt_path=short)
except graphpatch.Error as error:
    lacks = str(error)
kept = None
if {sharded} and rank == 0:
    from torch.distributed.checkpoint import FileSystemReader
    kept = sorted(k for k in FileSystemReader(folder / "last.ckpt").read_metadata().state_dict_metadata if k.startswith("state_dict."))
elif rank == 0:
    kept = sorted("state_dict." + k for k in torch.load(folder / "last.ckpt", weights_only=True)["state_dict"])
here = sorted(p.name for p in folder.iterdir() if "last" in p.name)
said(losses=first.losses + second.losses, kept=kept, here=here, refused=refused, lacks=lacks, factors=sorted("state_dict." + n for n in factors(second)))
"""
    told = run(tmp_path, script, ranks=2)
    # Both load on a single process, into a module that nobody shards.
    alone_again = """
loaded = load_from_checkpoint(Plain, folder / "last.ckpt")
said(trained=all(bool(p.count_nonzero()) for n, p in loaded.named_parameters() if "lora_B" in n), n=len(factors(loaded)))
"""
    assert run(tmp_path, alone_again) == {"trained": True, "n": 8}
    assert close(told["losses"], alone) and told["here"] == ["last.ckpt"]
    assert told["kept"] == told["factors"] and len(told["kept"]) == 8
    assert "GP831" in told["refused"] and "lora(rank=3)" in told["refused"]
    assert "GP832" in told["lacks"] and "linear_qkv.lora_B" in told["lacks"]


KILLED = """
import os, signal, time
from graphpatch.lightning import last_whole
class Tells(ModelCheckpoint):
    def _save_checkpoint(self, trainer, path):
        if rank == 0: (folder / f"saving{trainer.global_step}").touch()
        super()._save_checkpoint(trainer, path)
saver = Tells(folder / "kept", every_n_train_steps=1, save_top_k=-1, filename="{step}")
t = lora(); seeded(); module = Sharded(model_transform=t)
path = last_whole(folder / "kept") if (folder / "kept").exists() else None
trainer(folder, t, saver, strategy=strategy(True), max_epochs=3, enable_checkpointing=True, devices=2, use_distributed_sampler=False).fit(
    module, ResumableDataLoader(data(8).dataset, batch_size=4, sampler=Interleaved()), ckpt_path=path)
said(losses=module.losses, resumed=str(path))
"""


def test_two_ranks_killed_while_they_write_go_on_from_the_last_whole_checkpoint(tmp_path, alone):
    script = FSDP.strip() + KILLED.rstrip()
    for step, wait in ((4, 0.0), (7, 0.01)):
        started = start(tmp_path, script, ranks=2)
        while not (tmp_path / f"saving{step}").exists():
            assert started.poll() is None, started.said()
            time.sleep(0.001)
        time.sleep(wait)
        started.kill()
    told = run(tmp_path, script, ranks=2)
    assert "step=" in told["resumed"] and 1 <= len(told["losses"]) <= 7
    assert close(told["losses"], alone[-len(told["losses"]) :])


def test_a_model_that_was_sharded_before_is_refused(tmp_path):
    script = f"""
{FSDP.strip()}
try:
    trainer(folder, lora(), strategy=strategy(False), devices=2, max_epochs=1).fit(Sharded(early=False), halves())
except graphpatch.Error as error:
    said(text=str(error))
"""
    told = run(tmp_path, script, ranks=2)
    assert "GP810" in told["text"] and "before fully_shard" in told["text"]


@pytest.mark.parametrize("sharded", [True, False])
def test_an_adapter_stands_beside_what_two_ranks_write(tmp_path, sharded):
    script = f"""
{FSDP.strip()}
beside = ModelTransform(graphpatch.parse(RULES), adapter_directory=True)
module = Sharded(model_transform=beside)
saver = ModelCheckpoint(folder, filename="kept")
trainer(folder, beside, saver, strategy=strategy({sharded}), max_epochs=1, enable_checkpointing=True, devices=2).fit(module, halves())
here = {{n: getattr(p, "full_tensor", lambda p=p: p)().detach() for n, p in module.net.named_parameters() if "lora" in n}}
if rank == 0:
    torch.save(here, folder / "here.pt")
said(names=sorted(here))
"""
    told = run(tmp_path, script, ranks=2)
    alone_again = """
net = Plain().net
graphpatch.load_adapter(net, folder / "kept.adapter")
here = torch.load(folder / "here.pt")
said(same=[n for n, p in net.named_parameters() if "lora" in n and torch.equal(p, here[n])])
"""
    assert len(told["names"]) == 8 and sorted(run(tmp_path, alone_again)["same"]) == told["names"]


def test_under_fsdp2_a_model_on_the_meta_device_is_filled_before_it_is_sharded(tmp_path, alone):
    script = f"""
{FSDP.strip()}
from safetensors.torch import save_file
base = folder / f"base{{rank}}.safetensors"
save_file(Plain().net.state_dict(), base)
t = ModelTransform(graphpatch.parse(RULES), base_checkpoint=base)
seeded(); module = Sharded(born="meta", model_transform=t)
trainer(folder, t, strategy=strategy(False), max_epochs=3, devices=2, use_distributed_sampler=False).fit(module, halves())
unfilled = ModelTransform(graphpatch.parse(RULES))
try:
    trainer(folder, unfilled, strategy=strategy(False), max_epochs=1, devices=2).fit(Sharded(born="meta", model_transform=unfilled), halves())
except graphpatch.Error as error:
    said(losses=module.losses, code=error.code)
"""
    told = run(tmp_path, script, ranks=2)
    assert close(told["losses"], alone) and told["code"] in ("GP818", "GP822")


TENSOR = """
class Parallel(Plain):
    def __init__(self, early=True, **k):
        super().__init__(built="configure_model", **k)
        self.early = early
    def configure_model(self):
        if self.net is not None: return
        self.build()
        if self.early: self.model_transform(self.net)
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
        for layer in self.net.layers:
            plan = {"linear_qkv": ColwiseParallel(), "linear_proj": RowwiseParallel()}
            parallelize_module(layer, self.device_mesh["tensor_parallel"], plan)
            layer.requires_grad_()  # as PyTorch 2.6 leaves it
        if self.device_mesh["data_parallel"].size() > 1:
            from torch.distributed.fsdp import fully_shard
            for layer in self.net.layers: fully_shard(layer, mesh=self.device_mesh["data_parallel"])
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])
def strategy(sharded): return ModelParallelStrategy(data_parallel_size=options["devices"] // 2, tensor_parallel_size=2, save_distributed_checkpoint=sharded)
def made():
    t = lora(); return t, Parallel(model_transform=t)
options = dict(devices=2, use_distributed_sampler=False)
"""


def test_tensor_parallel_trains_as_one_process_and_resumes(tmp_path, alone):
    script = f"""
{TENSOR.strip()}
losses, keys = dict(), dict()
for sharded in (False, True):
    seeded(); t, first = made()
    saver = ModelCheckpoint(folder / str(sharded), save_last=True)
    trainer(folder, t, saver, strategy=strategy(sharded), max_epochs=2, enable_checkpointing=True, **options).fit(first, loader(8))
    t, second = made()
    path = folder / str(sharded) / "last.ckpt"
    trainer(folder, t, strategy=strategy(sharded), max_epochs=3, **options).fit(second, loader(8), ckpt_path=path)
    losses[sharded] = first.losses + second.losses
    loaded = load_from_checkpoint(Plain, path)
    assert all(p.count_nonzero() for n, p in loaded.named_parameters() if "lora_B" in n)
keys = sorted(torch.load(folder / "False" / "last.ckpt", weights_only=True)["state_dict"])
try:
    trainer(folder, lora(), strategy=strategy(False), max_epochs=1, **options).fit(Parallel(early=False), loader(8))
except graphpatch.Error as error:
    late = error.code
def noisy(seed):
    t = ModelTransform(graphpatch.parse(RULES.replace("rank=2", "rank=2, dropout=0.5")))
    torch.manual_seed(seed); module = Parallel(model_transform=t)
    trainer(folder, t, strategy=strategy(False), max_epochs=1, **options).fit(module, loader(8))
    both = [torch.zeros_like(p.full_tensor()) for n, p in module.named_parameters() if n.endswith("qkv.lora_A")]
    mine = [p.full_tensor() for n, p in module.named_parameters() if n.endswith("qkv.lora_A")]
    for place, value in zip(both, mine):
        torch.distributed.all_reduce(place.copy_(value))
    return module.losses, max((m - b / 2).abs().max().item() for m, b in zip(mine, both))
noise = [noisy(5), noisy(5), noisy(6)]
said(losses=losses, keys=keys, factors=sorted(factors(loaded)), late=late, noise=noise)
"""
    told = run(tmp_path, script, ranks=2)
    assert close(told["losses"]["false"], alone) and told["losses"]["true"] == told["losses"]["false"]
    assert told["keys"] == told["factors"] and len(told["keys"]) == 8 and told["late"] == "GP810"
    # Dropout is drawn from the same seed again, another from another, and what both ranks hold whole stays one.
    (one, apart), (again, _), (other, _) = told["noise"]
    assert one == again != other and apart == 0.0
