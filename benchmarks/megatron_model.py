"""A GPTModel of the local spec, and the ranks it stands on."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from graphpatch.megatron import cpu

VOCABULARY, LENGTH = 1024, 512


def on_ranks(size: int, case: Callable[..., None], *args: Any) -> None:
    """`case(*args)` on each of `size` ranks of tensor parallelism, a process and a thread each."""
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        fork = multiprocessing.get_context("fork")
        workers = [fork.Process(target=_rank, args=(rank, size, store, case, args)) for rank in range(size)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if any(worker.exitcode for worker in workers):
            raise SystemExit("a rank failed")


def _rank(rank: int, size: int, store: str, case: Callable[..., None], args: tuple[Any, ...]) -> None:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    cpu.enable()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=size)
    torch.manual_seed(0)
    model_parallel_cuda_manual_seed(0)
    case(*args)


def gpt(layers: int, hidden: int) -> nn.Module:
    """Llama's kind of layers: grouped queries, gated, without biases."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=8,
        num_query_groups=4,
        ffn_hidden_size=hidden * 11 // 4,
        gated_linear_unit=True,
        activation_func=nn.functional.silu,
        add_bias_linear=False,
        use_cpu_initialization=True,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
    )
    spec = get_gpt_layer_local_spec()
    model: nn.Module = GPTModel(config, spec, VOCABULARY, LENGTH, position_embedding_type="rope")
    return model
