"""A checkpoint is there as a whole or not at all, whatever happens to the process that writes it."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint as dcp

import graphpatch
from graphpatch.lightning import AtomicIO, last_whole
from graphpatch.lightning.atomic_folder import write_whole_folders
from graphpatch.lightning.sharded import read_sharded

from .common import Module, data, trainer
from .forked import Forked
from .test_checkpoints import lora


def write_for_ever(path: Path, started: Any) -> None:
    io, big = AtomicIO(), torch.arange(2_000_000)
    for number in range(100_000):
        io.save_checkpoint({"number": number, "big": big + number}, path)
        if number == 2:
            started.set()


def test_a_writer_killed_at_any_moment_leaves_a_whole_file(tmp_path):
    path, fork = tmp_path / "last.ckpt", multiprocessing.get_context("fork")
    for wait in (0.0, 0.003, 0.006, 0.009, 0.013, 0.02, 0.027, 0.035):
        started = fork.Event()
        writer = fork.Process(target=write_for_ever, args=(path, started))
        writer.start()
        assert started.wait(60)
        time.sleep(wait)
        writer.kill()
        writer.join()
        held = torch.load(path, weights_only=True)
        assert torch.equal(held["big"], torch.arange(2_000_000) + held["number"])
        assert last_whole(tmp_path) == path
    AtomicIO().save_checkpoint({"number": 0}, path)
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]  # what the killed ones left is gone


class Strategy:
    """Writes folders as Lightning's do, on one rank."""

    is_global_zero = True

    def barrier(self):
        pass

    def broadcast(self, it):
        return it

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        path.mkdir(parents=True, exist_ok=True)
        dcp.save({"state_dict": {"big": checkpoint["big"]}}, checkpoint_id=path, no_dist=True)
        torch.save({"number": checkpoint["number"]}, path / "meta.pt")


def written(path: Path, times: int, told: Any) -> None:
    strategy = Strategy()
    write_whole_folders(strategy)
    write_whole_folders(strategy)  # a trainer that is used twice
    for number in range(times):
        strategy.save_checkpoint({"number": number, "big": torch.arange(300_000) + number}, path)
        told.put(number)


def test_a_folder_written_over_and_over_and_killed_at_any_moment_is_whole(tmp_path):
    path, fork = tmp_path / "last.ckpt", multiprocessing.get_context("fork")
    for wait in (0.0, 0.002, 0.004, 0.006, 0.008, 0.01):
        told: Any = fork.SimpleQueue()
        writer = fork.Process(target=written, args=(path, 10_000, told))
        writer.start()
        while told.get() < 3:
            pass
        time.sleep(wait)
        writer.kill()
        writer.join()
        whole = last_whole(tmp_path)
        assert whole is not None
        held = read_sharded(whole)
        assert held["number"] >= 3
        assert torch.equal(held["state_dict"]["big"], torch.arange(300_000) + held["number"])
    written(path, 1, multiprocessing.SimpleQueue())
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"] and read_sharded(path)["number"] == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(graphpatch.Error, match="GP817"):
        written(tmp_path / "mine", 1, None)
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"


def test_killed_between_the_two_renames_the_newer_folder_takes_its_place(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for number, name in enumerate((f"last.ckpt.old.tmp-{gone.pid}", f"last.ckpt.tmp-{gone.pid}")):
        (tmp_path / name).mkdir()
        dcp.save({"state_dict": {"big": torch.ones(2)}}, checkpoint_id=tmp_path / name, no_dist=True)
        torch.save({"number": number}, tmp_path / name / "meta.pt")
    assert last_whole(tmp_path) == tmp_path / f"last.ckpt.tmp-{gone.pid}"
    AtomicIO().save_checkpoint({}, tmp_path / "other.ckpt")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.ckpt", "other.ckpt"]
    assert read_sharded(tmp_path / "last.ckpt")["number"] == 1
    AtomicIO().remove_checkpoint(tmp_path / "last.ckpt")
    assert [p.name for p in tmp_path.iterdir()] == ["other.ckpt"]


def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.ckpt"
    AtomicIO().save_checkpoint({"number": 1}, path)
    with pytest.raises(Exception, match="pickle"):
        AtomicIO().save_checkpoint({"number": 2, "bad": (i for i in range(3))}, path)
    assert torch.load(path, weights_only=True) == {"number": 1} and os.listdir(tmp_path) == ["a.ckpt"]


def test_last_whole_passes_over_what_is_torn(tmp_path):
    assert last_whole(tmp_path) is None
    for number in range(3):
        AtomicIO().save_checkpoint({"number": number}, tmp_path / f"{number}.ckpt")
        os.utime(tmp_path / f"{number}.ckpt", (number + 1, number + 1))
    torn = tmp_path / "2.ckpt"
    torn.write_bytes(torn.read_bytes()[:-40])
    (tmp_path / "sharded").mkdir()
    (tmp_path / "sharded" / "__0_0.distcp").write_bytes(b"")
    assert last_whole(tmp_path) == tmp_path / "1.ckpt"
    (tmp_path / "sharded" / ".metadata").write_bytes(b"")
    (tmp_path / "sharded" / "meta.pt").write_bytes(b"PK")
    assert last_whole(tmp_path) == tmp_path / "1.ckpt"
    torch.save({}, tmp_path / "sharded" / "meta.pt")
    assert last_whole(tmp_path) == tmp_path / "sharded"


def test_the_trainer_writes_so_unless_the_user_has_a_way(tmp_path):
    class Mine(AtomicIO):
        pass

    for given, expected in ((None, AtomicIO), (Mine(), Mine)):
        t = trainer(tmp_path, lora(), plugins=[given] if given else None)
        t.fit(Module(), data())
        assert type(t.strategy.checkpoint_io) is expected


RUN = """
import sys, time, torch
from pathlib import Path
from lightning.pytorch.callbacks import ModelCheckpoint
from graphpatch.lightning import ResumableDataLoader, last_whole
from tests.lightning.common import Module, data, trainer
from tests.lightning.test_checkpoints import lora

class Slow(Module):
    def training_step(self, batch, index):
        loss = super().training_step(batch, index)
        print(f"{self.global_step} {loss.item()!r}", flush=True)
        time.sleep(float(sys.argv[2]))
        return loss

folder = Path(sys.argv[1])
saver = ModelCheckpoint(folder, every_n_train_steps=2, save_top_k=-1, filename="{step}")
torch.manual_seed(5)
loader = ResumableDataLoader(data(8).dataset, batch_size=4, shuffle=True)
path = last_whole(folder) if folder.exists() else None
trainer(folder, lora(), saver, enable_checkpointing=True, max_epochs=3).fit(Slow(), loader, ckpt_path=path)
"""


def test_a_run_that_is_killed_again_and_again_is_the_run_that_was_not(tmp_path):
    # Nothing passes through a temporary folder, which may be another disk: there a rename is a copy, and no moment.
    elsewhere = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))

    def started(folder: Path, wait: float) -> Forked:
        (tmp_path / "said").unlink(missing_ok=True)
        script = f"import tempfile\ntempfile.tempdir = {str(elsewhere)!r}\n{RUN}"
        return Forked(script, [str(folder), str(wait)], output=tmp_path / "said")

    def said() -> dict[int, str]:
        lines = (tmp_path / "said").read_text().split("\n")[:-1] if (tmp_path / "said").exists() else []
        return {int(step): loss for step, loss in (line.split() for line in lines if line[:1].isdigit())}

    (tmp_path / "whole").mkdir()
    started(tmp_path / "whole", 0).wait()
    whole = said()
    assert sorted(whole) == list(range(24))
    losses: dict[int, str] = {}
    (tmp_path / "killed").mkdir()
    for kill_after in (5, 9, None):
        run = started(tmp_path / "killed", 0.01 if kill_after else 0)
        if kill_after is None:
            run.wait()
        while run.poll() is None:
            if len(said()) >= kill_after:
                run.kill()
        losses |= said()
    assert losses == whole
    assert not [p for p in elsewhere.rglob("*") if p.suffix in (".ckpt", ".pt") or "tmp-" in p.name]
    shutil.rmtree(elsewhere)
