"""A linear whose class has a forward of its own: what an update that stands beside it takes for granted of that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..lang.diagnostics import ApplyError, Diagnostic
from .merging import exact_arithmetic


def refuse_misfit(module: nn.Module, input: Tensor, output: Any) -> None:
    """Raise `ApplyError` (GP552) where the output is no tensor with a row of out features for each row of the input."""
    out = getattr(module, "out_features", None)
    if isinstance(output, Tensor):
        rows = input.shape[:-1]
        if output.shape[:-1] == rows and (not isinstance(out, int) or output.shape[-1] == out):
            return
        wanted = ", ".join(map(str, (*rows, "..." if out is None else out)))
        why = f"of an input of {tuple(input.shape)} it makes {tuple(output.shape)}, and of an update ({wanted})"
    else:
        why = f"it makes a {type(output).__name__}, and an update is a tensor"
    raise ApplyError(
        Diagnostic(
            "GP552",
            f"the forward of {type(module).__name__} is not that of a linear, and lora cannot add to what it makes",
            text=(why,),
            fixes=("leave these modules out: except **:" + type(module).__name__,),
        )
    )


def is_product(module: nn.Module, matrix: Callable[[nn.Module], Tensor]) -> bool:
    """Whether the module's own class still computes W x + b; tried on two rows, where its forward is not `nn.Linear`'s.

    Where that is not so, s B A x beside the output is not what the output gains from s B A in the weight. Of a weight
    that has no values here, or others than floats, nothing is said.
    """
    forward = getattr(type(module), "_graphpatch_base", type(module)).forward
    weight = module._parameters.get("weight")
    if forward is nn.Linear.forward or not isinstance(module, nn.Linear):
        return True
    if type(weight) is not nn.Parameter or weight.is_meta or weight.dtype not in _NEAR:
        return True
    rows = torch.rand(2, weight.shape[1], generator=torch.Generator().manual_seed(0)) - 0.5
    rows = rows.to(weight.device, weight.dtype)
    modes = [(part, part.training) for part in module.modules()]
    try:
        module.eval()
        with torch.no_grad(), exact_arithmetic(weight.device.type):
            product = linear(rows, matrix(module), module.bias)
            output = forward(module, rows.clone())
    except Exception:
        return False
    finally:
        for part, mode in modes:
            part.training = mode
    if not isinstance(output, Tensor) or output.shape != product.shape:
        return False
    near = _NEAR[weight.dtype] * float(product.abs().max())
    return bool(((output.to(product) - product).abs() <= near).all())


_NEAR = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 8e-3}
"""How near, of the largest element, two ways to compute one product come."""
