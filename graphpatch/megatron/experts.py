"""Modules that hold many experts: megatron-core's `GroupedMLP`, and the grouped linears of Transformer Engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

MLP, LINEAR = "GroupedMLP", "TEGroupedLinear"
"""By the names of their classes: either may be missing."""


class Experts(NamedTuple):
    """The experts of one module."""

    here: int
    """How many this rank has."""
    group: Any
    """The ranks that share all of them out."""
    replicas: Any
    """The ranks that have the same."""


def experts_of(module: Any) -> Experts | None:
    """None for a module that is no such."""
    kinds = {c.__name__ for c in type(module).__mro__}
    if MLP in kinds:
        return Experts(module.num_local_experts, module.ep_group, module.dp_group)
    if LINEAR in kinds:
        groups = module._pg_collection
        return Experts(module.num_gemms, groups.ep, groups.expt_dp)
    return None


class Stack(NamedTuple):
    """How the matrices of a `GroupedMLP`'s experts stand in one parameter: looked at as `view`, (experts, in, out)."""

    view: tuple[int, ...]
    dim: int
    """Of the view, along which ranks of tensor parallelism share each expert."""
    pieces: int
    """2 where what is shared is gate and up."""
    columns: bool
    """Whether the parameter is (in, experts * out), and not (experts * in, out)."""

    def matrix(self, shape: Sequence[int]) -> tuple[int, int]:
        """The shape of the parameter that is looked at as (experts, in, out)."""
        experts, first, second = shape
        return (first, experts * second) if self.columns else (experts * first, second)


def stack_of(module: Any, name: str) -> Stack | None:
    """Of a weight of a `GroupedMLP`; None for any other."""
    experts = experts_of(module)
    if experts is None or name not in ("weight1", "weight2"):
        return None
    hidden, held = module.config.hidden_size, module._parameters[name].numel()
    other = held // (experts.here * hidden)
    if name == "weight1":
        return Stack((experts.here, hidden, other), 2, 2 if module.config.gated_linear_unit else 1, True)
    return Stack((experts.here, other, hidden), 1, 1, False)


def is_expert(module: nn.Module) -> bool:
    """Whether a module is an expert's linear, or holds many experts."""
    return bool(getattr(module, "is_expert", False)) or experts_of(module) is not None
