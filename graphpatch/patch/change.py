"""The kinds of change, each with its way back. `undo` may be called on a change that was made only in part.

Changes in place, which are most, have a file of their own: `in_place.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import nn

from ..tree.tree import Mark
from .record import put_record, record_of

_COMPUTED_IN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Change(Protocol):
    """Something done to some modules, which stand in the tree at `nodes`."""

    mark: Mark
    nodes: list[int]
    modules: list[nn.Module]
    """The modules that carry the mark."""

    def do(self) -> None: ...

    def undo(self) -> None:
        """Take away what this change brought, and nothing of what other patches did to the same modules."""

    def switched_off(self) -> AbstractContextManager[None]:
        """The modules compute as if the change had not been made; nothing is registered or taken away."""


@dataclass(eq=False)
class AttributeChange:
    """Plain attributes with other values."""

    mark: Mark
    nodes: list[int]
    modules: list[nn.Module]
    values: list[Mapping[str, Any]]
    """Per module."""
    originals: list[Mapping[str, Any]]

    def do(self) -> None:
        for module, values, originals in zip(self.modules, self.values, self.originals):
            before = record_of(module)
            attributes = {**before.attributes, **originals}
            put_record(module, replace(before, marks=(*before.marks, self.mark), attributes=attributes))
            module.__dict__.update(values)

    def undo(self) -> None:
        for module, originals in zip(self.modules, self.originals):
            if self.mark in record_of(module).marks:
                module.__dict__.update(originals)
                put_record(module, record_of(module).without(self.mark, attributes=originals))

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        try:
            for module, originals in zip(self.modules, self.originals):
                module.__dict__.update(originals)
            yield
        finally:
            for module, values in zip(self.modules, self.values):
                module.__dict__.update(values)


@dataclass(eq=False)
class WeightChange:
    """Parameters kept in another way. The originals are let go once all is done, where they are not to be kept."""

    mark: Mark
    nodes: list[int]
    modules: list[nn.Module]
    values: Callable[[nn.Module], Mapping[str, torch.Tensor]]
    """Made one module at a time: all at once would need the memory that this is to save."""
    keep: bool
    originals: list[Mapping[str, nn.Parameter]] = field(default_factory=list)
    changed: list[Mapping[str, nn.Parameter]] = field(default_factory=list)

    def do(self) -> None:
        for module in self.modules:
            held = module.__dict__["_parameters"]
            made = {n: nn.Parameter(value, requires_grad=False) for n, value in self.values(module).items()}
            self.originals.append({name: held[name] for name in made})
            self.changed.append(made)
            before = record_of(module)
            put_record(module, replace(before, marks=(*before.marks, self.mark)))
            held.update(made)

    def settle(self) -> None:
        """Everything else is done too."""
        if not self.keep:
            self.originals = []

    @property
    def gone(self) -> bool:
        """Whether there is no way back."""
        return len(self.originals) < len(self.changed)

    def undo(self) -> None:
        self._put_back()
        for module in self.modules:
            put_record(module, record_of(module).without(self.mark))

    def _put_back(self) -> None:
        for module, original in zip(self.modules, self.originals):
            held = module.__dict__["_parameters"]
            for name, parameter in original.items():
                # `.to()` moved what stands in its place meanwhile.
                parameter.data = parameter.data.to(held[name].device, held[name].dtype)
            held.update(original)

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        # As they stand now: `.to()` makes others of them.
        now = [{name: m.__dict__["_parameters"][name] for name in made} for m, made in zip(self.modules, self.changed)]
        try:
            self._put_back()
            yield
        finally:
            for module, made in zip(self.modules, now):
                module.__dict__["_parameters"].update(made)

    def __getstate__(self) -> dict[str, Any]:
        # A copy or a file has the result, and makes nothing any more.
        return {**self.__dict__, "values": None}


@dataclass(eq=False)
class DropChange:
    """Parameters that are there no more. Each module's record keeps its own, for the way back."""

    mark: Mark
    nodes: list[int]
    modules: list[nn.Module]
    names: tuple[str, ...]

    def do(self) -> None:
        for module in self.modules:
            before, held = record_of(module), module.__dict__["_parameters"]
            gone = {name: held[name] for name in self.names}
            dropped = {**before.dropped, **gone}
            put_record(module, replace(before, marks=(*before.marks, self.mark), dropped=dropped))
            held.update(dict.fromkeys(gone))

    def undo(self) -> None:
        for module in self.modules:
            before = record_of(module)
            if self.mark in before.marks:
                self._put_back(module)
                kept = {name: p for name, p in before.dropped.items() if name not in self.names}
                put_record(module, replace(before.without(self.mark), dropped=kept))

    def _put_back(self, module: nn.Module) -> None:
        held, dropped = module.__dict__["_parameters"], record_of(module).dropped
        beside = next((p for p in held.values() if p is not None), None)
        for name in self.names:
            parameter = dropped[name]
            if beside is not None:
                # The model was moved, cast or filled meanwhile.
                dtype = beside.dtype if beside.dtype in _COMPUTED_IN else parameter.dtype
                if parameter.is_meta and not beside.is_meta:
                    empty = torch.empty(parameter.shape, device=beside.device, dtype=dtype)
                    parameter = nn.Parameter(empty, parameter.requires_grad)
                else:
                    parameter.data = parameter.data.to(beside.device, dtype)
            held[name] = parameter

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        try:
            for module in self.modules:
                self._put_back(module)
            yield
        finally:
            for module in self.modules:
                module.__dict__["_parameters"].update(dict.fromkeys(self.names))


@dataclass(eq=False)
class ModuleChange:
    """Other modules in the places of some."""

    mark: Mark
    nodes: list[int]
    originals: list[nn.Module]
    modules: list[nn.Module]
    places: list[list[tuple[nn.Module, str]]]
    """Per module, every parent and the name there."""

    def do(self) -> None:
        for original, new, places in zip(self.originals, self.modules, self.places):
            before = record_of(new)
            put_record(new, replace(before, marks=(*before.marks, self.mark), original=original))
            for parent, name in places:
                parent._modules[name] = new

    def undo(self) -> None:
        self._swap(self.modules, self.originals)
        for new in self.modules:
            before = record_of(new)
            put_record(new, replace(before.without(self.mark), original=None))

    def _swap(self, out: list[nn.Module], into: list[nn.Module]) -> None:
        for leaving, coming, places in zip(out, into, self.places):
            for parent, name in places:
                if parent._modules.get(name) is leaving:
                    parent._modules[name] = coming

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        try:
            self._swap(self.modules, self.originals)
            yield
        finally:
            self._swap(self.originals, self.modules)
