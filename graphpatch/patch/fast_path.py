"""Keeping PyTorch's encoders from computing past their children."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..tree.tree import Mark


@dataclass(eq=False)
class FastPathChange:
    """`nn.TransformerEncoderLayer` computes itself from its children's weights when it can, without calling them. A
    hook on the layer is what PyTorch takes as a reason not to. `nn.TransformerEncoder` makes nested tensors of a padded
    batch where its first layer is frozen, which attention outside of that path refuses."""

    mark: Mark
    nodes: list[int]
    modules: list[nn.Module]

    def do(self) -> None:
        for module in self.modules:
            if isinstance(module, nn.TransformerEncoder):
                module.register_forward_pre_hook(stay_padded, with_kwargs=True)
            else:
                module.register_forward_pre_hook(call_the_children)

    def undo(self) -> None:
        for module in self.modules:
            hooks = module._forward_pre_hooks
            mine = next((key for key, hook in hooks.items() if hook in (call_the_children, stay_padded)), None)
            if mine is not None:
                del hooks[mine]
                module._forward_pre_hooks_with_kwargs.pop(mine, None)

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        yield


def call_the_children(module: nn.Module, args: Any) -> None:
    """The hook: does nothing, and is there."""


def stay_padded(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The encoder's: what trains inside has gradients, which the encoder asks its input and first layer for alone."""
    source = args[0] if args else kwargs.get("src")
    if module.training or not torch.is_grad_enabled() or not isinstance(source, torch.Tensor):
        return None
    if source.requires_grad or source.is_nested or source.is_inference() or not source.is_floating_point():
        return None
    source = source.detach().requires_grad_()
    return ((source, *args[1:]), kwargs) if args else (args, {**kwargs, "src": source})
