"""The kinds of change, each with its way back. `undo` may be called on a change that was made only in part."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from ..rewrites.rewrite import InPlace
from ..tree.tree import Mark
from .record import RECORD, Record, put_record, record_of
from .subclass import class_with, set_class


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


class Factory(NamedTuple):
    """How to make a parameter that an op adds."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    trainable: bool
    buffer: bool = False
    """A persistent buffer, and no parameter."""


@dataclass(eq=False)
class InPlaceChange:
    """A mixin, an entry for it, and new parameters or buffers."""

    mark: Mark
    nodes: list[int]
    modules: list[nn.Module]
    mixin: type[InPlace]
    entry: Any
    added: tuple[str, ...]
    factories: list[Factory] = field(default_factory=list)
    """Needed to do, not to undo."""
    initialise: bool = True
    """Whether the new tensors get values; not where a file brings them."""
    devices: list[torch.device] = field(default_factory=list)
    """Of the new parameters; empty where each takes its module's weight's."""
    fast: bool = True
    """Whether parameters may be written where `register_parameter` would put them, which is 25 times as fast."""
    look: Callable[[int], Any] | None = None
    """Where the preflight left it to `do` to look at each module: it raises for the one at an index, if it must."""

    def do(self) -> None:
        # The loop that every target goes through: nothing is looked up twice, and what is the same as it was for the
        # module before is not worked out again.
        empty, put_class, attribute = torch.empty, object.__setattr__, self.mixin.entries
        # What nn.Parameter comes down to for a plain tensor, without its checks.
        make, parameter = torch.Tensor._make_subclass, nn.Parameter
        factories = [(f.name, f.shape, f.dtype, f.trainable) for f in self.factories if not f.buffer]
        buffers = [f for f in self.factories if f.buffer]
        states: dict[tuple[type, int, int], _State] = {}
        look, devices = self.look, self.devices
        for at, module in enumerate(self.modules):
            own = module.__dict__
            registered = own["_parameters"]
            if look is None:
                device = devices[at]
            else:
                weight = registered["weight"]
                device = weight.device
                if weight.__class__ is not parameter or own["_modules"]:
                    look(at)
            for name, shape, dtype, trainable in factories:
                if look is not None and (name in registered or name in own):
                    look(at)
                made = make(parameter, empty(*shape, dtype=dtype, device=device), trainable)
                if self.fast:
                    registered[name] = made
                else:
                    module.register_parameter(name, made)
            if buffers:
                for each in buffers:
                    module.register_buffer(each.name, empty(*each.shape, dtype=each.dtype, device=device))
                tensors = {
                    **{f[0]: registered[f[0]] for f in factories},
                    **{b.name: own["_buffers"][b.name] for b in buffers},
                }
            elif factories:
                tensors = {name: registered[name] for name in self.added}
            if self.factories and self.initialise and not device.type == "meta":
                self.mixin.initialise(self.entry, tensors, module)
            key = (module.__class__, id(own.get(attribute)), id(own.get(RECORD)))
            state = states.get(key) or self._with(module, states, key)
            own[attribute], own[RECORD] = state.entries, state.record
            if "forward" in own or "_old_forward" in own:
                set_class(module, state.cls)
            else:
                put_class(module, "__class__", state.cls)
        self.factories, self.devices, self.look = [], [], None

    def _with(self, module: nn.Module, states: dict[Any, _State], key: Any) -> _State:
        entries, before = module.__dict__.get(self.mixin.entries, ()), record_of(module)
        state = _State(
            class_with(module, lambda mixins: (*mixins, self.mixin)),
            (*entries, self.entry),
            replace(before, marks=(*before.marks, self.mark), added=before.added.union(self.added)),
            (entries, before),
        )
        return _remember(states, key, state)

    def undo(self) -> None:
        attribute = self.mixin.entries
        states: dict[tuple[type, int, int], _State] = {}
        for module in self.modules:
            own = module.__dict__
            for name in self.added:
                own["_parameters"].pop(name, None)
                own["_buffers"].pop(name, None)
            key = (type(module), id(own.get(attribute)), id(own.get(RECORD)))
            state = states.get(key) or self._without(module, states, key)
            if state.entries:
                own[attribute] = state.entries
            else:
                own.pop(attribute, None)
            put_record(module, state.record)
            set_class(module, state.cls)

    def _without(self, module: nn.Module, states: dict[Any, _State], key: Any) -> _State:
        entries, before = module.__dict__.get(self.mixin.entries, ()), record_of(module)
        left = _less(entries, self.entry)
        state = _State(
            class_with(module, lambda mixins: mixins if left else tuple(m for m in mixins if m is not self.mixin)),
            left,
            before.without(self.mark, self.added),
            (entries, before),
        )
        return _remember(states, key, state)

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        attribute = self.mixin.entries
        before = [module.__dict__.get(attribute, ()) for module in self.modules]
        less: dict[int, tuple] = {}
        try:
            for module, entries in zip(self.modules, before):
                if id(entries) not in less:
                    less[id(entries)] = _less(entries, self.entry)
                module.__dict__[attribute] = less[id(entries)]
            yield
        finally:
            for module, entries in zip(self.modules, before):
                module.__dict__[attribute] = entries


class _State(NamedTuple):
    """What becomes of all modules that have one class, one record and the same entries."""

    cls: type
    entries: tuple
    record: Record
    source: Any
    """What it was worked out from: kept alive, since the key it is remembered by holds ids."""


def _remember(states: dict[Any, _State], key: Any, state: _State) -> _State:
    # A parametrised module has a class of its own, so its key is never met again.
    states[key] = state
    return state


def _less(entries: tuple, entry: Any) -> tuple:
    if entry not in entries:
        return entries
    at = entries.index(entry)
    return entries[:at] + entries[at + 1 :]


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


@dataclass(eq=False)
class FastPathChange:
    """`nn.TransformerEncoderLayer` computes itself from its children's weights when it can, without calling them. A
    hook on the layer is what PyTorch takes as a reason not to."""

    mark: Mark
    nodes: list[int]
    modules: list[nn.Module]

    def do(self) -> None:
        for layer in self.modules:
            layer.register_forward_pre_hook(call_the_children)

    def undo(self) -> None:
        for layer in self.modules:
            hooks = layer._forward_pre_hooks
            mine = next((key for key, hook in hooks.items() if hook is call_the_children), None)
            if mine is not None:
                del hooks[mine]

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        yield


def call_the_children(module: nn.Module, args: Any) -> None:
    """The hook: does nothing, and is there."""
