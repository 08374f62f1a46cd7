"""The kinds of change, each with its way back. `undo` may be called on a change that was made only in part."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from ..rewrites.rewrite import InPlace
from ..tree.tree import Mark
from .record import RECORD, Held, Record, put_record, record_of
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
        self.factories, self.devices, self.look, self.seen, self.owners = [], [], None, (), ()

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
