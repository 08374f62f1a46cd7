"""Merging into a weight that is kept as codes: what it stands for gains the update, and is quantised anew.

Such a weight cannot be written in part, so another parameter takes its place, as PEFT does it for bitsandbytes; the old
one is what goes back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..rewrites.quantised import dequantised, is_quantised, requantised
from .record import Place


def is_coded(place: Place) -> bool:
    """Whether the parameter there is kept as codes."""
    module, name = place
    return is_quantised(module._parameters.get(name))


def decoded(place: Place) -> Tensor:
    """What the codes there stand for: a copy, of the module's shape, in the dtype that the module computes with."""
    module, name = place
    return dequantised(module, name).detach().clone(memory_format=torch.contiguous_format)


def put(place: Place, value: Tensor) -> None:
    """Have a value there: a parameter that stood there before, as it is, and any other in codes like those now."""
    module, name = place
    now = module._parameters[name]
    _take_state(module, now)
    if is_quantised(value):
        # `.to()` moved what stands in its place meanwhile.
        parameter = value if value.device == now.device else value.to(now.device)  # type: ignore[union-attr]
        made = parameter if isinstance(parameter, nn.Parameter) else nn.Parameter(parameter, requires_grad=False)
    else:
        made = requantised(module, value, name)
    module._parameters[name] = made
    _give_state(module, made)


def _take_state(module: nn.Module, parameter: Any) -> None:
    """bitsandbytes' 8-bit linears take codes and scales from their parameter in their first call: give them back."""
    state = getattr(module, "state", None)
    if type(parameter).__name__ == "Int8Params" and parameter.CB is None and getattr(state, "CB", None) is not None:
        parameter.CB, parameter.SCB = state.CB, state.SCB  # type: ignore[union-attr]


def _give_state(module: nn.Module, parameter: Any) -> None:
    state = getattr(module, "state", None)
    if type(parameter).__name__ == "Int8Params" and hasattr(state, "CB"):
        state.CB, state.SCB = parameter.CB, parameter.SCB  # type: ignore[union-attr]
