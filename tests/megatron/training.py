"""Some steps of training with megatron-core's own engine: what each rank ends with, by the global names of parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import nn

import graphpatch
from graphpatch.patch.record import record_of

from .models import BATCH, LENGTH, VOCABULARY, fill, gathered, gpt, pieces

MICROBATCHES = 2


def chunks_of(**options: Any) -> list[nn.Module]:
    """This rank's chunks of a stock model."""
    count = parallel_state.get_virtual_pipeline_model_parallel_world_size()
    return [gpt(vp_stage=at, **options) for at in range(count)] if count else [gpt(**options)]


def built(rules: str | None, **options: Any) -> list[nn.Module]:
    """This rank's chunks, patched, with factors whose values depend on their global names alone."""
    chunks = chunks_of(**options)
    if rules is not None:
        graphpatch.apply(chunks, graphpatch.parse(rules))  # type: ignore[call-overload]
        for chunk in chunks:
            _mark_pieces(chunk)
            fill(chunk, lambda name: "lora" in name)
    return chunks


def _mark_pieces(chunk: nn.Module) -> None:
    """A B for parts of a linear has the rows of one part behind those of another."""
    for module in chunk.modules():
        for held in record_of(module).held:
            how = getattr(held.entry, "spread", None)
            if how is not None:
                getattr(module, held.entry.b).pieces = [how.groups * how.sizes[part] for part in how.chosen]


def batch(step: int, at: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels of a microbatch."""
    draw = torch.Generator().manual_seed(1000 * step + at)
    ids = torch.randint(VOCABULARY, (BATCH, LENGTH + 1), generator=draw)
    return ids[:, :-1], ids[:, 1:]


def language(model: nn.Module, ids: torch.Tensor, labels: torch.Tensor) -> Any:
    return model(ids, torch.arange(LENGTH).expand(BATCH, LENGTH), None, labels=labels)


def trained(
    chunks: Sequence[nn.Module], steps: int = 5, distributed_optimizer: bool = False, call: Any = language
) -> dict[str, Any]:
    """`call` gives a model's output, whose mean is the loss. Losses, gradient norms, the first step's gradients, and parameters at the end; the last two by global name, whole."""
    config: Any = chunks[0].config
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=distributed_optimizer)
    models = [DistributedDataParallel(config, ddp, chunk) for chunk in chunks]
    config.finalize_model_grads_func = finalize_model_grads
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=2e-3,
            adam_eps=1e-4,  # so that noise in a gradient that is nearly zero stays noise
            weight_decay=0.0,
            clip_grad=1.0,
            use_distributed_optimizer=distributed_optimizer,
        ),
        models,
    )
    found: dict[str, Any] = {"losses": [], "norms": []}
    for step in range(steps):
        for model in models:
            model.zero_grad_buffer()
        optimizer.zero_grad()
        losses = _step(models, config, step, call)
        if parallel_state.is_pipeline_last_stage(ignore_virtual=True):
            found["losses"].append(sum(losses) / len(losses))
        if step == 0:
            found["grads"] = _whole(chunks, lambda p: p.main_grad)
        found["norms"].append(float(optimizer.step()[1]))
    found["parameters"] = _whole(chunks, lambda p: p.data)
    return found


def _step(models: Sequence[nn.Module], config: Any, step: int, call: Any) -> list[float]:
    losses: list[float] = []

    def forward(data: Any, model: nn.Module) -> Any:
        ids, labels = next(data)
        output = call(model, ids, labels)

        def loss(output: torch.Tensor) -> Any:
            mean = output.float().mean()
            losses.append(float(mean))
            return mean, {}

        return output, loss

    data = [iter([batch(step, at) for at in range(MICROBATCHES)]) for _ in models]
    get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=data if len(models) > 1 else data[0],
        model=list(models) if len(models) > 1 else models[0],
        num_microbatches=MICROBATCHES,
        seq_length=LENGTH,
        micro_batch_size=BATCH,
        forward_only=False,
    )
    return losses


def _whole(chunks: Sequence[nn.Module], value: Callable[[Any], torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        piece.name: gathered(piece.like, piece.of(value(p)))
        for chunk in chunks
        for name, p in chunk.named_parameters()
        if p.requires_grad
        for piece in pieces(chunk, name, p)
    }


def together(ranks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What all ranks hold: those that hold the same thing must agree."""
    found: dict[str, Any] = {"losses": next(r["losses"] for r in ranks if r["losses"]), "norms": ranks[0]["norms"]}
    for rank in ranks:
        assert rank["norms"] == ranks[0]["norms"]
        for kind in ("grads", "parameters"):
            for name, tensor in rank[kind].items():
                known = found.setdefault(kind, {}).setdefault(name, tensor)
                torch.testing.assert_close(tensor, known, rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n} differs: {m}")
    return found


def assert_same(parallel: dict[str, Any], one: dict[str, Any], tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(parallel["losses"], one["losses"], rtol=0, atol=tolerance)
    torch.testing.assert_close(parallel["norms"], one["norms"], rtol=0, atol=tolerance)
    for kind in ("grads", "parameters"):
        assert parallel[kind].keys() == one[kind].keys()
        for name, tensor in one[kind].items():
            torch.testing.assert_close(
                parallel[kind][name], tensor, rtol=0, atol=tolerance, msg=lambda m, n=name, k=kind: f"{k} of {n}: {m}"
            )
