"""Before anything changes: the batches that some ops must have seen, shown to the inputs of their targets."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..lang.diagnostics import ApplyError, Diagnostic, Error
from ..rewrites.rewrite import Observer
from .change import Change
from .imports import brief
from .in_place import InPlaceChange
from .run import as_it_was, call, eagerly


def observe(model: nn.Module, changes: Sequence[Change], batches: Iterable[Any] | None, paths: Sequence[str]) -> None:
    """Run the batches and leave in each change what its targets have seen; each batch once, until all is settled.

    `batches` are what `Patch.probe` takes one of; `paths` those of the model's nodes. Raises `ApplyError`: GP535 where
    an op needs batches and there are none, GP536 for batches that nothing looks at, GP537 where the model fails on one,
    GP538 where a target saw too little.
    """
    looking: list[tuple[InPlaceChange, Observer]] = []
    for change in changes:
        if isinstance(change, InPlaceChange) and change.initialise and change.modules:
            observer = change.mixin.observer(change.entry)
            if observer is not None:
                looking.append((change, observer))
    if not looking:
        if batches is not None:
            raise _error("GP536", "no op of this plan looks at batches", "leave `batches` out")
        return
    targets = [
        _Target(module, paths[node], observer)
        for change, observer in looking
        for node, module in zip(change.nodes, change.modules)
        if not any(p.is_meta for p in module.parameters(recurse=False))  # which gets no values either
    ]
    if targets:
        _run(model, targets, _checked(batches, looking[0][0]))
    states = {id(target.module): target.state for target in targets}
    for change, _ in looking:
        change.seen = [states.get(id(module)) for module in change.modules]


class _Target:
    """A module that is looked at, and what was seen there."""

    def __init__(self, module: nn.Module, path: str, observer: Observer):
        self.module, self.path, self.observer = module, path, observer
        self.state: Any = None

    @property
    def settled(self) -> bool:
        return self.observer.settled(self.state)


class _Shared:
    """Modules that get the very same tensor (q, k and v; gate and up) look at it once: a state is a value, and what
    comes after it is worked out for the first of them. A few are remembered, since a tensor must not go meanwhile."""

    def __init__(self) -> None:
        self.recent: deque[tuple[Observer, Any, Tensor, Any]] = deque(maxlen=4)

    def see(self, target: _Target, input: Tensor, mask: Tensor | None) -> None:
        for observer, before, tensor, after in self.recent:
            if tensor is input and before is target.state and observer == target.observer:
                target.state = after
                return
        after = target.observer.see(target.state, _rows(input.detach(), mask))
        self.recent.append((target.observer, target.state, input, after))
        target.state = after


def _run(model: nn.Module, targets: Sequence[_Target], batches: Iterator[Any]) -> None:
    devices = {p.device for p in model.parameters()}
    with as_it_was(model), torch.no_grad(), eagerly():
        for at, batch in enumerate(batches):
            if len(devices) == 1:
                batch = _moved(batch, next(iter(devices)))
            shared, mask = _Shared(), _mask(batch)
            with ExitStack() as stack:
                for target in targets:
                    if not target.settled:
                        hook = _looking(target, shared, mask)
                        stack.callback(target.module.register_forward_pre_hook(hook, with_kwargs=True).remove)
                try:
                    call(model, batch)
                except Error:
                    raise
                except Exception as error:
                    raise _error(
                        "GP537",
                        f"the model fails on batch {at}, and nothing has changed",
                        "a batch is a dict (keyword arguments), a tuple or list (positional ones), or a single value",
                        brief(error),
                    ) from error
            if all(target.settled for target in targets):
                break
    for target in targets:
        lacks = target.observer.lacks(target.state)
        if lacks:
            raise _error(
                "GP538",
                f"the batches do not tell enough for `{target.path}`: {lacks}",
                "give more batches, a lower rank, or leave that module out",
            )


def _looking(target: _Target, shared: _Shared, mask: Tensor | None) -> Any:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        input = args[0] if args else next(iter(kwargs.values()), None)
        if isinstance(input, Tensor):
            shared.see(target, input, mask)

    return hook


def _checked(batches: Iterable[Any] | None, first: InPlaceChange) -> Iterator[Any]:
    if batches is None:
        raise _error(
            "GP535",
            f"{first.mark.op} starts from data, and there are no batches",
            "graphpatch.apply(model, rules, batches=loader), or plan.apply(model, batches=loader)",
            first.mark.rule,
        )
    if isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        raise _error(
            "GP536", f"`batches` are several, and this is one {type(batches).__name__}", "a list: batches=[batch]"
        )
    return iter(batches)


def _mask(batch: Any) -> Tensor | None:
    """Which positions of a batch of text count: no padding, and of labelled text what has a label."""
    if not isinstance(batch, Mapping):
        return None
    mask, labels = batch.get("attention_mask"), batch.get("labels")
    mask = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
    if isinstance(labels, Tensor) and labels.dim() == 2:
        labelled = labels != -100
        mask = labelled if mask is None else mask & labelled if mask.shape == labelled.shape else mask
    return mask


def _rows(input: Tensor, mask: Tensor | None) -> Tensor:
    if mask is not None and input.shape[:-1] == mask.shape:
        return input[mask.to(input.device)]
    return input.reshape(-1, input.shape[-1])


def _moved(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _moved(value, device) for key, value in batch.items()}
    if type(batch) in (tuple, list):
        return type(batch)(_moved(value, device) for value in batch)
    return batch


def _error(code: str, title: str, fix: str, why: str = "") -> ApplyError:
    return ApplyError(Diagnostic(code, title, text=(why,) if why else (), fixes=(fix,)))
