"""A module stays the same object and computes more: a mixin in its class, an entry for it, and what the op adds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from ..rewrites.rewrite import InPlace, overrides
from ..tree.tree import Mark
from .record import RECORD, Held, Record, put_record, record_of
from .refuse import refuse_bypassed, refuse_class
from .subclass import class_with, set_class


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
    active: bool = True
    """Of an adapter: whether it is among those that are summed."""
    weight: float = 1.0
    """Of an adapter: what its update is multiplied by."""
    off: bool = False
    """Within `switched_off`, whatever `active` says."""
    merged: bool = False
    """What it does is in the weights."""
    seen: Sequence[Any] = ()
    """Per module, what was seen of its inputs, where the values come from data."""

    shared: tuple[str, ...] = ()
    """Parameters that are other modules', which register them first: the same objects."""
    owners: Sequence[nn.Module] = ()
    """Per module, that other. Needed to do, not to undo."""
    children: tuple[str, ...] = ()
    """The modules that each gains."""
    companions: list[InPlaceChange] = field(default_factory=list)
    """What it does to other modules, once it is done."""

    def do(self) -> None:
        # The loop that every target goes through: nothing is looked up twice, and what is the same as it was for the
        # module before is not worked out again.
        empty, put_class, attribute = torch.empty, object.__setattr__, self.mixin.entries
        # What nn.Parameter comes down to for a plain tensor, without its checks.
        make, parameter = torch.Tensor._make_subclass, nn.Parameter
        direct = [f for f in self.factories if "." not in f.name]
        factories = [(f.name, f.shape, f.dtype, f.trainable) for f in direct if not f.buffer]
        buffers = [f for f in direct if f.buffer]
        states: dict[tuple[type, int], _State] = {}
        look, devices, accompanied = self.look, self.devices, overrides(self.mixin, "companions")
        attributed = overrides(self.mixin, "attributes")
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
            for name in self.shared:
                registered[name] = self.owners[at]._parameters[name]
            if buffers:
                for each in buffers:
                    module.register_buffer(each.name, empty(*each.shape, dtype=each.dtype, device=device))
                tensors = {
                    **{f[0]: registered[f[0]] for f in factories},
                    **{b.name: own["_buffers"][b.name] for b in buffers},
                }
            elif factories:
                tensors = {name: registered[name] for name, *_ in factories}
            else:
                tensors = {}
            if self.children:
                tensors |= self._with_children(module, device)
            if attributed:
                for name, attributes in self.mixin.attributes(self.entry, module).items():
                    tensors[name].__dict__.update(attributes)
            if self.factories and self.initialise and not device.type == "meta":
                self.mixin.initialise(self.entry, tensors, module)
                if self.seen:
                    self.mixin.learn(self.entry, tensors, self.seen[at])
            key = (module.__class__, id(own.get(RECORD)))
            state = states.get(key) or self._with(module, states, key)
            own[attribute], own[RECORD] = state.entries, state.record
            if "forward" in own or "_old_forward" in own:
                set_class(module, state.cls)
            else:
                put_class(module, "__class__", state.cls)
            for other, mixin, entry in self.mixin.companions(self.entry, module) if accompanied else ():
                self.accompany(self.nodes[at], other, mixin, entry)
        self.factories, self.devices, self.look, self.seen, self.owners = [], [], None, (), ()

    def accompany(self, node: int, module: nn.Module, mixin: type[InPlace], entry: Any) -> None:
        """Another module has a part in it, from now on."""
        named = f"{type(module).__name__} in the target"
        refuse_bypassed(module, named, self.mark.rule)
        refuse_class(module, lambda: named, self.mark.rule)
        # It takes no slot there: what else the module carries is free to come and go.
        change = InPlaceChange(self.mark._replace(slots=frozenset()), [node], [module], mixin, entry, ())
        change.devices = [torch.device("meta")]  # of nothing: it adds none
        self.companions.append(change)
        change.do()

    def _with_children(self, module: nn.Module, device: torch.device) -> dict[str, torch.Tensor]:
        """Give a module its children, and them their tensors, which are returned by dotted names."""
        with torch.device("meta"):
            made = self.mixin.submodules(self.entry, module)
        for name, child in made.items():
            module.add_module(name, child.train(module.training))
        tensors: dict[str, torch.Tensor] = {}
        for factory in self.factories:
            path, _, name = factory.name.rpartition(".")
            if not path:
                continue
            owner, value = module.get_submodule(path), torch.empty(*factory.shape, dtype=factory.dtype, device=device)
            if factory.buffer:
                owner.register_buffer(name, value)
                tensors[factory.name] = value
            else:
                parameter = nn.Parameter(value, requires_grad=factory.trainable)
                owner.register_parameter(name, parameter)
                tensors[factory.name] = parameter
        return tensors

    def _with(self, module: nn.Module, states: dict[Any, _State], key: Any) -> _State:
        before = record_of(module)
        after = replace(
            before,
            marks=(*before.marks, self.mark),
            added=before.added.union(self.added, self.shared, self.children),
            held=(*before.held, Held(self.mixin, self.entry, self.shown)),
        )
        cls = class_with(module, lambda mixins: (*mixins, self.mixin))
        return _remember(states, key, _State(cls, after.entries(self.mixin.entries), after, before))

    def undo(self) -> None:
        for companion in reversed(self.companions):
            companion.undo()
        self.companions = []
        attribute = self.mixin.entries
        states: dict[tuple[type, int], _State] = {}
        for module in self.modules:
            own = module.__dict__
            for name in (*self.added, *self.shared):
                own["_parameters"].pop(name, None)
                own["_buffers"].pop(name, None)
            for name in self.children:
                own["_modules"].pop(name, None)
            key = (type(module), id(own.get(RECORD)))
            state = states.get(key) or self._without(module, states, key)
            if any(held.mixin.entries == attribute for held in state.record.held):
                own[attribute] = state.entries
            else:
                own.pop(attribute, None)
            put_record(module, state.record)
            set_class(module, state.cls)

    def _without(self, module: nn.Module, states: dict[Any, _State], key: Any) -> _State:
        before = record_of(module)
        gone = (*self.added, *self.shared, *self.children)
        after = before.without(self.mark, gone).without_entry(self.mixin, self.entry)
        needed = any(held.mixin is self.mixin for held in after.held)
        cls = class_with(module, lambda mixins: mixins if needed else tuple(m for m in mixins if m is not self.mixin))
        return _remember(states, key, _State(cls, after.entries(self.mixin.entries), after, before))

    @property
    def shown(self) -> Any:
        """What the modules' `forward` shall see: the entry, one in its place, or None."""
        return None if self.off or self.merged else self.weighted

    @property
    def weighted(self) -> Any:
        """The entry, with its weight; None where it is not active."""
        return self.when_active if self.active else None

    @property
    def when_active(self) -> Any:
        """The same as if it were active; None where its weight is 0."""
        if self.weight == 0.0:
            return None
        return self.entry if self.weight == 1.0 else self.mixin.weighted(self.entry, self.weight)

    def show(self) -> None:
        """Bring `active`, `weight`, `off` and `merged` to the modules. Nothing is registered, and no class changes, so
        that a sharded or replicated model keeps what it has."""
        attribute, shown = self.mixin.entries, self.shown
        states: dict[int, _State] = {}
        for module in self.modules:
            before = record_of(module)
            state = states.get(id(before))
            if state is None:
                after = before.showing(self.mixin, self.entry, shown)
                state = states[id(before)] = _State(type(module), after.entries(attribute), after, before)
            put_record(module, state.record)
            module.__dict__[attribute] = state.entries
        for companion in self.companions:
            companion.off = self.off
            companion.show()

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        try:
            self.off = True
            self.show()
            yield
        finally:
            self.off = False
            self.show()


class _State(NamedTuple):
    """What becomes of all modules that have one class and one record."""

    cls: type
    entries: tuple
    record: Record
    source: Record
    """What it was worked out from: kept alive, since the key it is remembered by holds its id."""


def _remember(states: dict[Any, _State], key: Any, state: _State) -> _State:
    # A parametrised module has a class of its own, so its key is never met again.
    states[key] = state
    return state
