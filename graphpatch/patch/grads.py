"""Which parameters train: set as the plan says, with what was there before kept for the way back."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from torch import nn

from ..lang.diagnostics import ApplyError, Diagnostic
from ..plan.freeze import TRAIN, Grads
from ..rewrites.quantised import is_quantised
from ..rewrites.rewrite import overrides
from ..tree.tree import Tree
from .change import Change
from .in_place import InPlaceChange
from .record import Journal, record_of

Flag = tuple[nn.Module, str, bool]
"""A parameter, by its module and name there, and whether it required grad before."""


def set_flags(tree: Tree, grads: Grads, flags: list[Flag], added: Mapping[int, Collection[str]] | None = None) -> None:
    """Set `requires_grad` as `grads` says of whole modules, and journal in `flags` what each was.

    `added` names the new parameters by node; None before there are any. What earlier patches added is not new: it is
    frozen as the base is.
    """
    assert tree.modules is not None
    of_added, each, nothing = grads.added, grads.each, frozenset[str]()
    for node, (module, want) in enumerate(zip(tree.modules, grads.own)):
        own = module.__dict__
        held = own["_parameters"]
        if not held:
            continue
        new = nothing if added is None else frozenset(added.get(node, ()))
        for name, parameter in held.items():
            state = of_added[node] if name in new else want
            if not state or parameter is None or (each and (node, name) in each):
                continue
            train = state == TRAIN
            # `train **` passes over what cannot have a gradient, the integers of a quantised base.
            if not train or _can_train(parameter):
                before = parameter.requires_grad
                # Also where it is so already: when the patch that made it so is reverted, this one still wants it.
                flags.append((module, name, before))
                if before is not train:
                    parameter.requires_grad = train


def set_single_flags(tree: Tree, grads: Grads, flags: list[Flag]) -> None:
    """The same for single parameters, which win over what is said of their module.

    Raises `ApplyError` (GP517) where one shall train that cannot have a gradient.
    """
    assert tree.modules is not None
    for (node, name), state in grads.each.items():
        module = tree.modules[node]
        parameter = module.__dict__["_parameters"].get(name)
        if parameter is None or not state:
            continue
        train = state == TRAIN
        if train and not _can_train(parameter):
            path = ".".join(p for p in (tree.paths[node], name) if p)
            holds = str(parameter.dtype).removeprefix("torch.")
            fix = "only floating-point parameters have gradients: leave it out"
            raise ApplyError(Diagnostic("GP517", f"`{path}` cannot be trained: it holds {holds}", fixes=(fix,)))
        flags.append((module, name, parameter.requires_grad))
        parameter.requires_grad = train


def still(changes: Iterable[Change], flags: list[Flag]) -> None:
    """Stop the training of what ops want to stand still, and journal it as `set_flags` does, which goes after it: ops
    that ask for this add modules."""
    for change in changes:
        if isinstance(change, InPlaceChange) and overrides(change.mixin, "stills"):
            for owner in change.modules:
                for module, name in change.mixin.stills(change.entry, owner):
                    parameter = module._parameters[name]
                    assert parameter is not None
                    flags.append((module, name, parameter.requires_grad))
                    parameter.requires_grad = False


def _can_train(parameter: nn.Parameter) -> bool:
    return (parameter.is_floating_point() or parameter.is_complex()) and not is_quantised(parameter)


def restore_flags(journal: Journal, later: Iterable[Journal]) -> None:
    """Give back the flags that `journal` changed.

    Where a later patch has set one again, that stays, and what the later one will go back to is what this one found.
    """
    # From the last to the first, so that of a parameter set twice the first note stands.
    waiting = {(id(module), name): before for module, name, before in reversed(journal.flags)}
    for after in later:
        if waiting and after.flags:
            after.flags = [
                (module, name, waiting.pop((id(module), name), before)) for module, name, before in after.flags
            ]
    for module, name, before in reversed(journal.flags):
        parameter = module.__dict__["_parameters"].get(name)
        if parameter is None:  # taken away by a later patch, which may give it back
            parameter = record_of(module).dropped.get(name)
        if parameter is not None and (id(module), name) in waiting:
            parameter.requires_grad = before


def forget_gone(journals: Iterable[Journal]) -> None:
    """Drop notes on parameters that are there no longer: another adapter may get the same name."""
    for journal in journals:
        if any(name not in module.__dict__["_parameters"] for module, name, _ in journal.flags):
            journal.flags = [flag for flag in journal.flags if flag[1] in flag[0].__dict__["_parameters"]]
