"""Which parameters train: set as the plan says, with what was there before kept for the way back."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import nn

from ..lang.diagnostics import ApplyError, Diagnostic
from ..plan.freeze import TRAIN, Grads
from ..tree.tree import Tree
from .record import Journal, record_of

Flag = tuple[nn.Module, str, bool]
"""A parameter, by its module and name there, and whether it required grad before."""


def set_flags(tree: Tree, grads: Grads, added: Mapping[int, Collection[str]] | None, flags: list[Flag]) -> None:
    """Set `requires_grad` and journal each change in `flags`.

    `added` names the new parameters by node; None where the records of the modules tell them.
    Raises `ApplyError` (GP517) where a rule names a single parameter to train that cannot have a gradient.
    """
    assert tree.modules is not None
    for node, (module, want) in enumerate(zip(tree.modules, grads.own)):
        own = module.__dict__["_parameters"]
        if not own:
            continue
        new = record_of(module).added if added is None else added.get(node, ())
        for name, parameter in own.items():
            if parameter is None:
                continue
            state = grads.added[node] if name in new else want
            if state and parameter.requires_grad is not (state == TRAIN):
                # One by one what each says wins, below; so it is not flipped to and fro here.
                if not grads.each or grads.each.get((node, name)) is None:
                    _set(module, name, parameter, state == TRAIN, flags)
    for (node, name), state in grads.each.items():
        module = tree.modules[node]
        parameter = module.__dict__["_parameters"].get(name)
        if parameter is not None and state and parameter.requires_grad is not (state == TRAIN):
            _set(module, name, parameter, state == TRAIN, flags, node, tree)


def _set(
    module: nn.Module,
    name: str,
    parameter: Any,
    train: bool,
    flags: list[Flag],
    node: int = -1,
    tree: Tree | None = None,
) -> None:
    if train and not (parameter.is_floating_point() or parameter.is_complex()):
        if tree is None:
            return  # `train **` means those that can; the integers of a quantised base are no news to anybody
        path = ".".join(p for p in (tree.paths[node], name) if p)
        raise ApplyError(
            Diagnostic(
                "GP517",
                f"`{path}` cannot be trained: it holds {str(parameter.dtype).removeprefix('torch.')}",
                fixes=("only floating-point parameters have gradients: leave it out",),
            )
        )
    flags.append((module, name, parameter.requires_grad))
    parameter.requires_grad = train


def restore_flags(journal: Journal, later: Iterable[Journal]) -> None:
    """Give back the flags that `journal` changed.

    Where a later patch has set one again, that stays, and what the later one will go back to is what this one found.
    """
    waiting = {(id(module), name): before for module, name, before in journal.flags}
    for after in later:
        if waiting and after.flags:
            after.flags = [
                (module, name, waiting.pop((id(module), name), before)) for module, name, before in after.flags
            ]
    for module, name, before in journal.flags:
        parameter = module.__dict__["_parameters"].get(name)
        if parameter is not None and (id(module), name) in waiting:
            parameter.requires_grad = before
