"""megatron-core on a CPU over gloo, for tests and laptops: stand-ins for what it asks of CUDA without need.

Nothing here is active until `enable()` is called. Each stand-in is put in where the thing it stands for is there, not
by version, so that one file serves all releases.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
from collections.abc import Callable, Iterator
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._device import _device_constructors

from ..lang.diagnostics import ApplyError, Diagnostic
from ..rewrites.grouped import grouped_mm

_enabled = False


def enable() -> None:
    """Let megatron-core run in this process on the CPU. For the life of the process, and a second call does nothing.

    `torch.cuda`'s streams, events, random state and current device become the CPU's, a `device="cuda"` given to a
    function that makes tensors means the CPU, and `Tensor.cuda()` gives the tensor itself; `with torch.device("meta")`
    means what it meant. Raises `ApplyError` (GP901) where a GPU is there, since all that would be wrong then.
    """
    global _enabled
    if _enabled:
        return
    if torch.cuda.is_available():
        fix = "leave graphpatch.megatron.cpu.enable() out: megatron-core runs as it is"
        raise ApplyError(Diagnostic("GP901", "there is a GPU, and megatron-core is to run on the CPU", fixes=(fix,)))
    _devices()
    _streams()
    _random_states()
    _factories()
    _types()
    _experts()
    _checkpoints()
    _enabled = True


def is_enabled() -> bool:
    return _enabled


def _devices() -> None:
    cpu = torch.device("cpu")
    _put(torch.cuda, "current_device", lambda: cpu)
    _put(torch.cuda, "set_device", lambda device: None)
    _put(torch.cuda, "device_count", lambda: 1)
    _put(torch.cuda, "is_available", lambda: False)  # which a build of torch for CUDA may tell by counting devices
    _put(torch.cuda, "synchronize", lambda device=None: None)
    _put(torch.cuda, "empty_cache", lambda: None)
    _put(torch.Tensor, "cuda", lambda self, *args, **kwargs: self)
    _put(torch.nn.Module, "cuda", lambda self, *args, **kwargs: self)


class _Stream:
    """A stream or an event: what is put into it is done already."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: self if name == "record_event" else None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream)

    def __hash__(self) -> int:
        return 0


def _streams() -> None:
    one = _Stream()
    for name in ("current_stream", "default_stream"):
        _put(torch.cuda, name, lambda device=None: one)
    for name in ("Stream", "Event"):
        _put(torch.cuda, name, _Stream)
    _put(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    # What optimizers ask whether a graph is being captured; a build of torch for CUDA looks for a device then.
    accelerator = getattr(torch, "accelerator", None)
    if accelerator is not None:
        _put(accelerator, "is_available", lambda: False)
        _put(accelerator, "current_stream", lambda device=None: one)


_DEFAULT = "default-rng"


def _random_states() -> None:
    """The CPU's generator in the place of the GPU's: streams that differ by rank, and recomputation, work as there."""
    _put(torch.cuda, "get_rng_state", lambda device="cuda": torch.get_rng_state())
    _put(torch.cuda, "set_rng_state", lambda state, device="cuda": torch.set_rng_state(state))
    _put(torch.cuda, "manual_seed", lambda seed: torch.default_generator.manual_seed(int(seed)))
    _put(torch.cuda, "manual_seed_all", torch.cuda.manual_seed)
    random = import_module("megatron.core.tensor_parallel.random")
    _put(random, "_get_cuda_rng_state", lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state())
    _put(random, "_set_cuda_rng_state", lambda state, device=-1, graph_safe=False: torch.set_rng_state(state))

    @contextlib.contextmanager
    def fork(self: Any, name: str = "model-parallel-rng") -> Iterator[None]:
        # As megatron's own, which warns where the CPU's state changes within. One in another goes on with what that
        # drew: under sequence parallelism all layers are in one.
        if name not in self.states_:
            raise Exception(f"cuda rng state {name} is not added")
        outer, around = torch.get_rng_state(), getattr(self, "_current_state_name", _DEFAULT)
        if around != _DEFAULT:
            self.states_[around] = outer
        torch.set_rng_state(self.states_[name])
        self._current_state_name = name
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(outer if around == _DEFAULT else self.states_[around])
            self._current_state_name = around

    _put(random.CudaRNGStatesTracker, "fork", fork)


_FACTORIES = (
    "arange empty empty_like empty_strided eye full full_like linspace ones ones_like rand rand_like randint randn "
    "randn_like randperm tensor zeros zeros_like"
)


def _factories() -> None:
    # `with torch.device(...)` knows functions by identity, from when it first looks: these, not what stands for them.
    _device_constructors()
    for name in _FACTORIES.split():
        _put(torch, name, _on_the_cpu(getattr(torch, name)))


def _on_the_cpu(make: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(make)
    def made(*args: Any, **kwargs: Any) -> Any:
        device = kwargs.get("device")
        if device is not None and not isinstance(device, int) and str(device).startswith("cuda"):
            kwargs["device"] = "cpu"
        return make(*args, **kwargs)

    return made


def _types() -> None:
    """Megatron's optimizers tell dtypes by the names of CUDA's tensor types."""
    plain = torch.Tensor.type

    def named(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None and not args and not kwargs:
            return plain(self).replace("torch.", "torch.cuda.", 1)  # type: ignore[union-attr]
        return plain(self, dtype, *args, **kwargs)

    _put(torch.Tensor, "type", named)


def _experts() -> None:
    """The router asks for a kernel of Transformer Engine without looking whether it is there, the number of tokens a
    rank sends is a tensor that on CUDA alone is made a list, and the package with the products of `GroupedMLP` is for
    CUDA alone."""
    utils = _found("megatron.core.transformer.moe.moe_utils")
    if utils is not None and not hasattr(utils, "te_general_gemm"):
        utils.te_general_gemm = None  # type: ignore[attr-defined]
    grouped = _found("megatron.core.transformer.moe.grouped_gemm_util")
    if grouped is not None and grouped.grouped_gemm is None:
        grouped.ops = SimpleNamespace(gmm=_grouped_products)
        grouped.grouped_gemm = SimpleNamespace(ops=grouped.ops)
    plain = torch.distributed.all_to_all_single

    @functools.wraps(plain)
    def sent(
        output: Any, input: Any, output_split_sizes: Any = None, input_split_sizes: Any = None, **rest: Any
    ) -> Any:
        return plain(output, input, _listed(output_split_sizes), _listed(input_split_sizes), **rest)

    _put(torch.distributed, "all_to_all_single", sent)


def _grouped_products(a: torch.Tensor, b: torch.Tensor, batch_sizes: torch.Tensor, trans_b: bool = False) -> Any:
    return grouped_mm(a, b.mT if trans_b else b, batch_sizes.cumsum(0))


def _listed(sizes: Any) -> Any:
    return sizes.tolist() if isinstance(sizes, torch.Tensor) else sizes


def _checkpoints() -> None:
    """The writer's queue is a process that is spawned, which imports the caller's main module anew; a forked one does
    not, and starts in no time."""
    writer = _found("megatron.core.dist_checkpointing.strategies.filesystem_async")
    if writer is None:
        return
    kept: list[Any] = []

    def queue(*args: Any, **kwargs: Any) -> Any:
        if not kept:
            manager = multiprocessing.get_context("fork").Manager()
            kept[:] = [manager, manager.Queue()]
        return kept[1]

    for name in ("_get_write_results_queue", "get_write_results_queue"):
        if hasattr(writer, name):
            _put(writer, name, queue)


def _found(module: str) -> Any:
    try:
        return import_module(module)
    except ImportError:
        return None


def _put(owner: Any, name: str, value: Any) -> None:
    setattr(owner, name, value)
