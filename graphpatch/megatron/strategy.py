"""`MegatronStrategy`: Lightning's trainer on megatron-core's own engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from ..lang.diagnostics import refusal
from . import cpu
from .engine import optimizer_like, step
from .ranks import told

Forward = Callable[[nn.Module, Any], tuple[Tensor, Callable[[Tensor], Tensor]]]
"""From a model chunk and a microbatch to its output, and a function that makes the loss of it, called on the last
stage."""


class MegatronStrategy(DDPStrategy):
    """Tensor, sequence, pipeline, expert and data parallelism by megatron-core: its groups, its DDP and optimizer, its
    schedules, its distributed checkpoints.

    >>> class Model(lightning.pytorch.LightningModule):
    ...     def configure_model(self):
    ...         self.model = GPTModel(...)  # this rank's stage; an nn.ModuleList of virtual chunks
    ...     def forward_step(self, model, batch):
    ...         output = model(batch["ids"], batch["positions"], None, labels=batch["labels"])
    ...         return output, lambda output: output.float().mean()
    ...     def training_step(self, batch, index):
    ...         return self.trainer.strategy.run(batch, self.forward_step)
    ...     validation_step = training_step

    The model is built in `configure_model`. `configure_optimizers` returns AdamW, Adam or SGD, whose numbers the engine
    takes over, and schedulers, which act on it. `num_microbatches` is into how many each batch is cut, along the first
    dimension of its tensors. A checkpoint is a folder; it holds what trains, and loads at another layout of ranks.

    On a CPU: `graphpatch.megatron.cpu.enable()` first. Raises `ApplyError`: GP934 for sizes that do not agree, GP935
    for what Lightning does otherwise.
    """

    def __init__(
        self,
        tensor_model_parallel_size: int = 1,
        pipeline_model_parallel_size: int = 1,
        virtual_pipeline_model_parallel_size: int | None = None,
        sequence_parallel: bool = False,
        expert_model_parallel_size: int = 1,
        expert_tensor_parallel_size: int | None = None,
        num_microbatches: int = 1,
        distributed_optimizer: bool = False,
        **options: Any,
    ):
        super().__init__(**options)
        self.sizes = {
            "tensor_model_parallel_size": tensor_model_parallel_size,
            "pipeline_model_parallel_size": pipeline_model_parallel_size,
            "virtual_pipeline_model_parallel_size": virtual_pipeline_model_parallel_size,
            "expert_model_parallel_size": expert_model_parallel_size,
            "expert_tensor_parallel_size": expert_tensor_parallel_size,
        }
        self.sequence_parallel, self.num_microbatches = sequence_parallel, num_microbatches
        self.distributed_optimizer = distributed_optimizer
        self.chunks: list[nn.Module] = []
        self.wrapped: list[nn.Module] = []
        self.engine: Any = None
        self.gradient_norm = 0.0
        """Of the last step, over all ranks."""

    # ── processes ──
    def setup_environment(self) -> None:
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

        if not torch.cuda.is_available() and not cpu.is_enabled():
            raise refusal(
                "GP934", "megatron-core asks for a GPU, and there is none", "graphpatch.megatron.cpu.enable()"
            )
        super().setup_environment()
        if not parallel_state.is_initialized():
            parallel_state.initialize_model_parallel(**self.sizes)
            model_parallel_cuda_manual_seed(torch.initial_seed() % 2**31)

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        from megatron.core import parallel_state

        return {
            "num_replicas": parallel_state.get_data_parallel_world_size(),
            "rank": parallel_state.get_data_parallel_rank(),
        }

    # ── setting up ──
    def setup(self, trainer: Any) -> None:
        assert self.accelerator is not None and self.model is not None
        self.accelerator.setup(trainer)
        self.model_to_device()
        module: Any = self.lightning_module
        self.chunks = _chunks_in(module)
        self._refuse_disagreement()
        self.wrapped = [_in_half(chunk) for chunk in self.chunks]
        if trainer.state.fn == TrainerFn.FITTING:
            self._setup_training(trainer, module)
        self.setup_precision_plugin()

    def _setup_training(self, trainer: Any, module: Any) -> None:
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )

        if trainer.accumulate_grad_batches != 1:
            fix = "MegatronStrategy(num_microbatches=...) cuts a batch, and sums over its parts"
            raise refusal("GP935", "accumulate_grad_batches is not for megatron-core's schedules", fix)
        config: Any = _config_of(self.chunks)
        config.finalize_model_grads_func = finalize_model_grads
        ddp = DistributedDataParallelConfig(use_distributed_optimizer=self.distributed_optimizer)
        self.wrapped = [DistributedDataParallel(config, ddp, chunk) for chunk in self.wrapped]
        self.setup_optimizers(trainer)
        if len(self.optimizers) != 1:
            raise refusal("GP933", f"configure_optimizers gave {len(self.optimizers)} optimizers", "give one")
        half = {"bf16": bool(config.bf16), "fp16": bool(config.fp16)}
        clip = float(trainer.gradient_clip_val or 0.0)
        self.engine = optimizer_like(self.optimizers[0], self.wrapped, clip, self.distributed_optimizer, half)
        # The engine clips by the norm over all ranks, and `run` has made the gradients when Lightning would zero them.
        module.configure_gradient_clipping = _nothing
        module.optimizer_zero_grad = _nothing

    def _refuse_disagreement(self) -> None:
        config: Any = _config_of(self.chunks)
        for name, wanted in {**self.sizes, "sequence_parallel": self.sequence_parallel}.items():
            has = getattr(config, name, wanted)
            if name != "virtual_pipeline_model_parallel_size" and wanted is not None and has != wanted:
                raise refusal(
                    "GP934", f"the model's config has {name}={has}, and the strategy {wanted}", "give both the same"
                )

    # ── a step ──
    def run(self, batch: Any, forward: Forward) -> Tensor:
        """Forward, and in training backward, of a batch, by megatron-core's schedule. Returns the mean loss of its
        microbatches, over the replicas, on every rank."""
        from megatron.core import parallel_state
        from megatron.core.pipeline_parallel import get_forward_backward_func

        module: Any = self.lightning_module
        training = bool(module.trainer.training)
        if training:
            for model in self.wrapped:
                model.zero_grad_buffer()  # type: ignore[operator]
            self.engine.zero_grad()
        parts = _cut(batch, self.num_microbatches)
        losses: list[Tensor] = []

        def stage(data: Any, model: nn.Module) -> Any:
            output, loss_of = forward(model, next(data))

            def loss(output: Tensor) -> Any:
                found = loss_of(output)
                losses.append(found.detach().clone())  # the schedule divides it in place
                return found, {}

            return output, loss

        several = len(self.wrapped) > 1
        data = [iter(parts) for _ in self.wrapped]
        length = _first(parts[0]).shape[1]
        get_forward_backward_func()(
            forward_step_func=stage,
            data_iterator=data if several else data[0],
            model=self.wrapped if several else self.wrapped[0],
            num_microbatches=self.num_microbatches,
            seq_length=length,
            micro_batch_size=_first(parts[0]).shape[0],
            forward_only=not training,
        )
        total = torch.zeros((), device=self.root_device)
        if losses:
            total = torch.stack(losses).mean().float()
            replicas = parallel_state.get_data_parallel_group()
            torch.distributed.all_reduce(total, group=replicas)
            total = total / replicas.size()
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        torch.distributed.broadcast(total, last, group=parallel_state.get_pipeline_model_parallel_group())
        return total

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        return closure_loss  # `run` did it

    def optimizer_step(self, optimizer: Any, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        loss = closure()
        self.gradient_norm = step(self.engine, optimizer)
        return loss

    # ── checkpoints ──
    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return True

    @property
    def lightning_restore_optimizer(self) -> bool:
        return False

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return {}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """What schedulers have made of its numbers; the engine has the moments."""
        return {"param_groups": [_numbers(group) for group in optimizer.param_groups]}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        from megatron.core import dist_checkpointing

        path = Path(filepath)
        if self.is_global_zero:
            path.mkdir(parents=True, exist_ok=True)
        self.barrier()
        dist_checkpointing.save(self._sharded("optimizer_states" in checkpoint), str(path))
        ours = checkpoint.get("graphpatch")
        if ours is not None:
            # Of one rank: what a whole model has is told by the tensors themselves.
            ours.update(names=None, base=None)
        checkpoint = {**checkpoint, _STREAMS: {"sizes": self.sizes, "ranks": told(_streams().get_states())}}
        if self.is_global_zero:
            torch.save(checkpoint, path / "meta.pt")
        self.barrier()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        from megatron.core import dist_checkpointing

        path = Path(checkpoint_path)
        meta: dict[str, Any] = torch.load(path / "meta.pt", map_location="cpu", weights_only=True)
        held = self._sharded(self.engine is not None and "optimizer_states" in meta, loading=True)
        loaded = dist_checkpointing.load(held, str(path))
        for at, chunk in enumerate(self.chunks):
            chunk.load_state_dict(loaded[f"model{at}"], strict=False)
        streams = meta.pop(_STREAMS, {})
        # At another layout there are other ranks, each with a part of another activation to draw for.
        if streams.get("sizes") == self.sizes and len(streams["ranks"]) == self.world_size:
            _streams().set_states(streams["ranks"][self.global_rank])
        if "optimizer" in loaded:
            self.engine.load_state_dict(loaded["optimizer"])
            for optimizer, state in zip(self.optimizers, meta["optimizer_states"]):
                for group, saved in zip(optimizer.param_groups, state["param_groups"]):
                    group.update(saved)
        return meta

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        pass  # with the tensors of all ranks, in `load_checkpoint`

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        pass

    def _sharded(self, optimizer: bool, loading: bool = False) -> dict[str, Any]:
        """What trains, as entries of a distributed checkpoint."""
        found: dict[str, Any] = {}
        for at, chunk in enumerate(self.chunks):
            kept = {name for name, p in chunk.named_parameters() if p.requires_grad}
            entries = chunk.sharded_state_dict(metadata={})  # type: ignore[operator]
            found[f"model{at}"] = {name: entry for name, entry in entries.items() if name in kept}
        if optimizer:
            whole = {f"{chunk}.{name}": entry for chunk, held in found.items() for name, entry in held.items()}
            found["optimizer"] = self.engine.sharded_state_dict(whole, is_loading=loading)
        return found

    def teardown(self) -> None:
        module: Any = self.lightning_module
        for name in ("configure_gradient_clipping", "optimizer_zero_grad"):
            if module is not None:
                module.__dict__.pop(name, None)
        self.chunks, self.wrapped, self.engine = [], [], None
        super().teardown()


_STREAMS = "megatron_random_streams"
"""In a checkpoint: the states of the streams that megatron-core's dropout draws from, of every rank."""


def _streams() -> Any:
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    return get_cuda_rng_tracker()


def _nothing(*args: Any, **kwargs: Any) -> None:
    """What Lightning would do here is megatron-core's to do."""


def _numbers(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}


def _chunks_in(module: nn.Module) -> list[nn.Module]:
    """The outermost modules of megatron-core, in the order in which they stand."""
    from megatron.core.transformer.module import MegatronModule

    found: list[nn.Module] = []

    def look(part: nn.Module) -> None:
        if isinstance(part, MegatronModule):
            found.append(part)
            return
        for child in part.children():
            look(child)

    look(module)
    if not found:
        raise refusal(
            "GP934",
            f"{type(module).__name__} holds no model of megatron-core",
            "build it in configure_model: self.model = GPTModel(...)",
        )
    return found


def _config_of(chunks: Sequence[nn.Module]) -> Any:
    return chunks[0].config


def _in_half(chunk: nn.Module) -> nn.Module:
    from megatron.core.transformer.module import Float16Module

    config: Any = chunk.config
    return Float16Module(config, chunk) if config.bf16 or config.fp16 else chunk


def _cut(batch: Any, number: int) -> list[Any]:
    """A batch in microbatches, along the first dimension of each of its tensors."""
    if isinstance(batch, Tensor):
        if len(batch) % number:
            fix = "a batch size that num_microbatches divides (drop_last=True for the last one)"
            raise refusal("GP935", f"a batch of {len(batch)} is not cut into {number} microbatches", fix)
        return list(batch.chunk(number))
    if isinstance(batch, dict):
        return [dict(zip(batch, values)) for values in zip(*(_cut(value, number) for value in batch.values()))]
    if isinstance(batch, (list, tuple)):
        return [type(batch)(values) for values in zip(*(_cut(value, number) for value in batch))]
    return [batch] * number


def _first(batch: Any) -> Tensor:
    """The first tensor of a batch."""
    while not isinstance(batch, Tensor):
        batch = next(iter(batch.values() if isinstance(batch, dict) else batch))
    return batch
