"""The factors of any kind of module as stacks of matrices, (stack, rank, in) and (stack, out, rank), and back."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd


def shares(module: nn.Module) -> int:
    """Into how many the rank is split: each group of a grouped convolution has its own part of it."""
    return module.groups if isinstance(module, _ConvNd) else 1


def stacked(a: Tensor, b: Tensor, module: nn.Module) -> tuple[Tensor, Tensor]:
    """Of `module`'s A and B: one matrix each of a linear or an embedding, one a group of a convolution, and experts'
    as they are."""
    if a.dim() == 3 and not isinstance(module, _ConvNd):
        return a, b
    apart = a.unflatten(0, (shares(module), -1))
    if isinstance(module, _ConvTransposeNd):  # (channels, rank, kernel), as its weight is stored
        apart = apart.transpose(1, 2)
    return apart.flatten(2) if apart.dim() > 2 else apart, b.unflatten(0, (shares(module), -1)).flatten(2)


def unstacked(a: Tensor, module: nn.Module, shape: Sequence[int]) -> Tensor:
    """A as `module` has it, in its `shape`. B has its elements in the same order in both."""
    if isinstance(module, _ConvTransposeNd):
        a = a.unflatten(2, (shape[0] // module.groups, -1)).transpose(1, 2)
    return a.reshape(shape)
