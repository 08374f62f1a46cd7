"""megatron-core's own optimizer, by the one that a LightningModule configures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..lang.diagnostics import refusal


def optimizer_like(
    given: torch.optim.Optimizer, chunks: Sequence[nn.Module], clip: float, distributed: bool, half: dict[str, bool]
) -> Any:
    """The one that steps over ranks, with the class and numbers of `given`, which stays what schedulers act on.

    Raises `ApplyError` (GP933) for a class that megatron-core has none like, and for several parameter groups.
    """
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    kinds = {torch.optim.AdamW: "adam", torch.optim.Adam: "adam", torch.optim.SGD: "sgd"}
    kind = kinds.get(type(given))
    decays = type(given) is torch.optim.Adam and any(group["weight_decay"] for group in given.param_groups)
    if kind is None or decays:
        raise refusal(
            "GP933",
            f"megatron-core has no optimizer like {type(given).__name__}" + (" with weight_decay" if decays else ""),
            "configure_optimizers: torch.optim.AdamW, or SGD",
        )
    if len(given.param_groups) > 1:
        raise refusal("GP933", "several parameter groups are not passed on to megatron-core's optimizer", "give one")
    (group,) = given.param_groups
    numbers: dict[str, Any] = {"lr": float(group["lr"]), "weight_decay": group["weight_decay"], "clip_grad": clip}
    if kind == "adam":
        numbers |= {"adam_beta1": group["betas"][0], "adam_beta2": group["betas"][1], "adam_eps": group["eps"]}
    else:
        numbers |= {"sgd_momentum": group["momentum"]}
    config = OptimizerConfig(optimizer=kind, use_distributed_optimizer=distributed, **numbers, **half)
    return get_megatron_optimizer(config, list(chunks))


def step(engine: Any, given: torch.optim.Optimizer) -> float:
    """One step at the learning rate that `given` has by now. Returns the norm of the gradient, over all ranks."""
    for group in engine.param_groups:
        group["lr"] = given.param_groups[0]["lr"] * group.get("lr_mult", 1.0)
    _, norm, _ = engine.step()
    return float(norm or 0.0)
