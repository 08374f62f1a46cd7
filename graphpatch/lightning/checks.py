"""What is refused, or warned of, before it goes wrong in silence."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from ..lang.diagnostics import refusal

if TYPE_CHECKING:
    from .callback import ModelTransform


def refuse_mixed(trainer: Any, module: Any) -> None:
    """Lightning exists under two names, whose classes are not each other's."""
    for what, cls in ((trainer, pl.Trainer), (module, pl.LightningModule)):
        if not isinstance(what, cls):
            raise refusal(
                "GP805",
                f"{type(what).__module__}.{type(what).__name__} is none of lightning.pytorch's",
                "import everything from `lightning.pytorch`, nothing from `pytorch_lightning`",
            )


def refuse_strategy(trainer: Any) -> None:
    """DeepSpeed keeps parameters in buffers of its own, and writes checkpoints past every hook."""
    if any(cls.__name__ == "DeepSpeedStrategy" for cls in type(trainer.strategy).__mro__):
        raise refusal(
            "GP815",
            "DeepSpeed saves and loads checkpoints past the module, so they would hold the base and lose the adapter",
            "strategy=ModelParallelStrategy(data_parallel_size=...), which shards as ZeRO-3 does",
        )


def refuse_swallowed(module: pl.LightningModule) -> None:
    from .callback import ModelTransform

    for name, value in getattr(module, "hparams", {}).items():
        if isinstance(value, ModelTransform):
            raise refusal(
                "GP806",
                f"save_hyperparameters() took the argument `{name}`, a {type(value).__name__}",
                f'self.save_hyperparameters(ignore=["{name}"])',
                text=("it would be pickled into every checkpoint, which then cannot be loaded to resume",),
            )


def refuse_other_callbacks(trainer: pl.Trainer, transform: ModelTransform, transformed: bool) -> None:
    """Callbacks that would undo what a transform does, or copy the model too early."""
    from lightning.pytorch.callbacks import BaseFinetuning, StochasticWeightAveraging

    from .callback import ModelTransform

    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    at = callbacks.index(transform)
    for number, other in enumerate(callbacks):
        if isinstance(other, BaseFinetuning):
            raise refusal(
                "GP807",
                f"{type(other).__name__} unfreezes what the rules freeze",
                "leave that callback out: `freeze` and `train` statements say what trains",
            )
        if isinstance(other, ModelTransform) and other is not transform and other.state_key == transform.state_key:
            raise refusal(
                "GP808",
                f"two {type(transform).__name__} callbacks add an adapter of the same name",
                'give each a name: adapter="math"',
            )
        if isinstance(other, StochasticWeightAveraging) and not transformed:
            raise refusal(
                "GP809",
                f"{type(other).__name__} copies the model before it is transformed",
                "transform it before: lora(module), then trainer.fit(module); or use WeightAveraging",
            )
        if number < at and any(c.__name__ == "WeightAveraging" for c in type(other).__mro__):
            raise refusal(
                "GP809",
                f"{type(other).__name__} copies the model before it is transformed",
                f"list {type(transform).__name__} before it in callbacks",
            )


def is_sharded(parameter: nn.Parameter) -> bool:
    return type(parameter.data).__name__ == "DTensor"


def refuse_sharded(module: nn.Module, transformed: bool) -> None:
    """Parameters added to a sharded model train wrong and raise nothing."""
    if transformed:
        return
    name = next((n for n, p in module.named_parameters() if is_sharded(p)), None)
    if name is not None:
        raise refusal(
            "GP810",
            f"`{name}` is sharded already, and what is added now would train wrong",
            "in configure_model, before fully_shard or parallelize_module: self.model_transform(self.net)",
        )


def refuse_meta(module: nn.Module) -> None:
    """Whoever fills the meta device later fills only what he knows, and leaves factors as the memory was."""
    name = next((n for n, t in (*module.named_parameters(), *module.named_buffers()) if t.is_meta), None)
    if name is not None:
        raise refusal(
            "GP818",
            f"`{name}` is on the meta device still, and what is added to it has no values either",
            "base_checkpoint=..., which fills the model before it is transformed",
            "or fill it in configure_model",
        )


def refuse_idle(trainer: pl.Trainer, module: pl.LightningModule) -> list[tuple[str, nn.Parameter]]:
    """What trains. An optimizer of nothing is refused by torch, in words that say nothing of rules."""
    trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    if not trained and trainer.state.fn == "fit" and is_overridden("configure_optimizers", module):
        raise refusal("GP811", "nothing is left to train", "a `train` statement, or `freeze ** except @new`")
    return trained


def refuse_uncovered(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """An optimizer that was made before the transform knows nothing of what it brought."""
    if not trainer.optimizers:
        return
    held = {id(p) for o in trainer.optimizers for group in o.param_groups for p in group["params"]}
    trained = refuse_idle(trainer, module)
    if not any(id(p) in held for _, p in trained):
        raise refusal(
            "GP812",
            f"the optimizer holds none of the {len(trained)} parameters that train, `{trained[0][0]}` first",
            "make it in configure_optimizers, which is called after the transform, and not in __init__",
        )


def warn_of_replay(trainer: pl.Trainer) -> None:
    """Resumed within an epoch, a loader that knows no place begins it anew, and no batch is what it would have been."""
    loaders = trainer.train_dataloader
    for loader in loaders if isinstance(loaders, (list, tuple)) else [loaders]:
        if not hasattr(loader, "load_state_dict"):
            warnings.warn(
                f"graphpatch: the checkpoint is from within an epoch, and {type(loader).__name__} cannot go on there: "
                "Lightning gives its batches from the first again. graphpatch.lightning.ResumableDataLoader goes on.",
                stacklevel=2,
            )
