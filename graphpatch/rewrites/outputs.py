"""What a module puts out: a tensor, or a tuple that begins with one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..lang.diagnostics import ApplyError, Diagnostic


def on_first(output: Any, change: Callable[[Tensor], Tensor], op: str) -> Any:
    """The output with `change` done to it, or to the first of a tuple, list or named tuple. Raises `ApplyError` (GP520)
    for an output of another kind."""
    if isinstance(output, Tensor):
        return change(output)
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        rest = (change(output[0]), *output[1:])
        # A named tuple is made of its fields one by one.
        return type(output)(*rest) if hasattr(output, "_fields") else type(output)(rest)
    raise ApplyError(
        Diagnostic(
            "GP520",
            f"{op} cannot change a {type(output).__name__}",
            text=("it changes a tensor, or the first of a tuple",),
            fixes=("target a module further in, whose output is a tensor",),
        )
    )
