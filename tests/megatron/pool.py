"""Processes for parallel tests: forked from this one, which has imported everything, so that a case takes 0.2 s.

A case is a function that each rank runs, with megatron-core's groups set up; `ranks` gives what each returned. A rank that
fails ends the others, and its traceback is the test's; a group that takes too long is ended and told of.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import megatron.core.dist_checkpointing
import megatron.core.distributed
import megatron.core.models.gpt.gpt_layer_specs
import megatron.core.models.gpt.gpt_model
import megatron.core.optimizer
import megatron.core.pipeline_parallel  # noqa: F401
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

import graphpatch.checkpoint
import graphpatch.patch.apply  # noqa: F401
from graphpatch.megatron import cpu

SEED = 7


class RankFailed(AssertionError):
    """A rank raised: its traceback."""


def ranks(
    case: Callable[..., Any],
    *args: Any,
    tp: int = 1,
    pp: int = 1,
    dp: int = 1,
    vpp: int | None = None,
    ep: int = 1,
    etp: int | None = None,
    timeout: float = 60,
) -> list[Any]:
    """What `case(*args)` returned on each of tp * pp * dp ranks, in their order. Tensors come back as copies."""
    world = tp * pp * dp
    sizes = {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "virtual_pipeline_model_parallel_size": vpp,
        "expert_model_parallel_size": ep,
        "expert_tensor_parallel_size": etp,
    }
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        ends: dict[Connection, int] = {}
        workers = []
        for rank in range(world):
            mine, theirs = fork.Pipe(duplex=False)
            store = os.path.join(folder, "store")
            worker = fork.Process(target=_worker, args=(theirs, rank, world, store, sizes, case, args, timeout))
            worker.start()
            theirs.close()
            ends[mine] = rank
            workers.append(worker)
        try:
            return _collected(ends, workers, time.monotonic() + timeout)
        finally:
            for worker in workers:
                # With what it started: a checkpoint's writer has a process of its own, which would outlive it.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(worker.pid or 0, signal.SIGKILL)
                worker.kill()
                worker.join()


def one(case: Callable[..., Any], *args: Any, timeout: float = 60) -> Any:
    """The same on a single process: what a parallel case is held against."""
    return ranks(case, *args, timeout=timeout)[0]


def _collected(ends: dict[Connection, int], workers: list[Any], until: float) -> list[Any]:
    results: dict[int, Any] = {}
    world = len(workers)
    while ends:
        ready = wait(list(ends), 0.2)
        if not ready:
            # What a rank started may hold its end of the pipe open after its death.
            dead = next((rank for rank in ends.values() if workers[rank].exitcode is not None), None)
            if dead is not None and not wait(list(ends), 0):
                raise RankFailed(f"rank {dead} of {world} died without a word")
            if time.monotonic() > until:
                raise RankFailed(f"ranks {sorted(ends.values())} of {world} did not end in time")
        for end in ready:
            assert isinstance(end, Connection)
            rank = ends.pop(end)
            try:
                failed, payload = end.recv()
            except EOFError:
                raise RankFailed(f"rank {rank} of {world} died without a word") from None
            if failed:
                raise RankFailed(f"rank {rank} of {world}:\n{payload}")
            results[rank] = torch.load(io.BytesIO(payload), weights_only=False)
    return [results[rank] for rank in range(world)]


def _worker(
    end: Connection,
    rank: int,
    world: int,
    store: str,
    sizes: dict[str, Any],
    case: Callable[..., Any],
    args: tuple[Any, ...],
    timeout: float,
) -> None:
    os.setpgid(0, 0)
    try:
        torch.set_num_threads(1)
        # What megatron-core compiles would look for a device, which a forked process may not.
        torch.compiler.set_stance("force_eager")
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=timeout)
        )
        cpu.enable()
        parallel_state.initialize_model_parallel(**sizes)
        torch.manual_seed(SEED)
        model_parallel_cuda_manual_seed(SEED)
        payload = io.BytesIO()
        torch.save(case(*args), payload)
        end.send((False, payload.getvalue()))
    except BaseException:
        end.send((True, traceback.format_exc()))
    finally:
        end.close()
    os._exit(0)  # gloo's threads and pytest's own exit hooks have nothing to say here
