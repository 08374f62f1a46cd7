"""The five ways in which a module can be changed. A rewrite says how; the patch room does it, and undoes it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import nn

from ..ops.op import Op
from .merging import Merging, Unmergeable

# To a type checker a mixin is a module, so that `super().forward` and `self.training` are known; at run time it stays
# a plain class, since a mixin derived from nn.Module would stand before the base in every method resolution.
if TYPE_CHECKING:
    _Module = nn.Module
else:
    _Module = object


class Observer(Protocol):
    """Looks at the inputs of one module, for an op that starts from data. It has an equality and no state of its own:
    what was seen is a value, None at first, so that modules that are given the same inputs share it."""

    def see(self, state: Any, rows: torch.Tensor) -> Any:
        """The state after these rows (n x features) of an input too."""

    def settled(self, state: Any) -> bool:
        """Whether more rows would tell nothing new."""

    def lacks(self, state: Any) -> str:
        """Why what was seen is not enough, in a sentence; empty where it is."""


class InPlace(_Module):
    """A mixin that stands before a module's own class: the module stays the same object and computes more.

    Each op on a module leaves one *entry* (any immutable value with an equality, such as a NamedTuple) in the tuple
    that the instance holds under the name `entries`. `forward` goes through that tuple and must do nothing when it is
    empty: this is how a patch is switched off, and how several ops of one kind share a module. A mixin has no
    `__init__` and no `__slots__`, and is importable by name.
    """

    level: ClassVar[int] = 0
    """The op's level: mixins are sorted by it, the lowest next to the base class."""
    entries: ClassVar[str]
    by_row: ClassVar[bool] = False
    """Of a mixin of adapters: whether `_addend(entry, input, output)` gives what one adds for some rows alone."""

    @classmethod
    def entry(cls, op: Op, parameter: str | None = None) -> Any:
        """What `forward` has to know of this op; `parameter` is the target where that is one of the module's."""
        raise NotImplementedError

    @classmethod
    def check(cls, entry: Any, module: nn.Module) -> None:
        """Raise `Refusal` where the live module cannot be changed so, which no plan can know. Asked of each target
        before anything changes."""

    @classmethod
    def companions(cls, entry: Any, module: nn.Module) -> Iterable[tuple[nn.Module, type[InPlace], Any]]:
        """Other modules that have a part in it, each with its mixin and entry; asked when `module` has its own."""
        return ()

    @classmethod
    def stills(cls, entry: Any, module: nn.Module) -> Iterable[tuple[nn.Module, str]]:
        """Parameters that the model had, by module and name, which stop training unless the rules say otherwise."""
        return ()

    @classmethod
    def config_values(cls, entry: Any, module: nn.Module) -> Mapping[str, Any]:
        """Attributes of the module's `config` that say otherwise while the change is there. The config that others
        share is left alone: the module, and those below it that have the same, get a copy."""
        return {}

    @classmethod
    def uncalled(cls, entry: Any, module: nn.Module) -> Iterable[nn.Module]:
        """The modules that nobody calls while the change is there, so that another op on them would do nothing."""
        return ()

    @classmethod
    def weighted(cls, entry: Any, weight: float) -> Any:
        """Of an adapter (an entry with a field `adapter`): the entry that adds `weight` times as much."""
        raise NotImplementedError

    @classmethod
    def variant(cls, below: type) -> type[InPlace]:
        """A subclass made for what stands below, decided once per generated class and not in every call."""
        return cls

    @classmethod
    def submodules(cls, entry: Any, module: nn.Module) -> Mapping[str, nn.Module]:
        """The modules that the op adds to `module`, by name, made anew in each call; called with the meta device as the
        default. What tensors they hold stands in the op's `adds`, by dotted names (`post_norm.weight`), and is made
        from there: on the target's device, in the dtype given there."""
        return {}

    @classmethod
    def attributes(cls, entry: Any, module: nn.Module) -> Mapping[str, Mapping[str, Any]]:
        """Attributes that the tensors which the op adds to `module` bear, by the tensor's name."""
        return {}

    @classmethod
    def initialise(cls, entry: Any, tensors: Mapping[str, torch.Tensor], module: nn.Module) -> None:
        """Fill the parameters and buffers that the op adds to `module`, given by name; nothing else of it may change.
        Never called on the meta device, nor where an adapter's file brings the values."""

    @classmethod
    def observer(cls, entry: Any) -> Observer | None:
        """What must have seen the target's inputs before `learn` is called; None for an op that needs no data."""
        return None

    @classmethod
    def learn(cls, entry: Any, tensors: Mapping[str, torch.Tensor], seen: Any) -> None:
        """After `initialise`: fill what the observer's last state tells of."""

    @classmethod
    def approaches(cls, entry: Any) -> bool:
        """Whether `approach` shall be called: it starts from what a quantised weight was before."""
        return False

    @classmethod
    def approach(
        cls, entry: Any, tensors: Mapping[str, torch.Tensor], module: nn.Module, original: torch.Tensor
    ) -> None:
        """After `initialise`: fill what the `original` of the module's quantised weight tells of."""

    @classmethod
    def merging(
        cls, entry: Any, tensors: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]]
    ) -> Mapping[str, Merging]:
        """What this op makes of the module's parameters where it is merged into them: by name, those that change.

        `tensors` are what the op added, by name; `shapes` those of the module's own parameters. Raises `Unmergeable`
        for an op, or an entry, that is no change of weights.
        """
        raise Unmergeable("what it does is no change of a weight")

    @classmethod
    def merging_into(
        cls,
        module: nn.Module,
        entry: Any,
        tensors: Mapping[str, torch.Tensor],
        shapes: Mapping[str, tuple[int, ...]],
    ) -> Mapping[str, Merging]:
        """The same for a live module, of which a process may have a part."""
        return cls.merging(entry, tensors, shapes)

    @classmethod
    def measures(cls, entry: Any) -> bool:
        """Whether what it adds depends on the weight it stands beside, so that nothing may be merged into that."""
        return False

    def extra_repr(self) -> str:
        # Of all ops on this module, the innermost first; this one function stands for all mixins.
        names = dict.fromkeys(mixin.entries for mixin in getattr(type(self), "_graphpatch_mixins", ()))
        texts = [entry.text for name in names for entry in getattr(self, name) if getattr(entry, "text", "")]
        return ", ".join(text for text in (super().extra_repr(), *texts) if text)


def overrides(mixin: type[InPlace], name: str) -> bool:
    """Whether a mixin has an answer of its own to what all are asked, module by module."""
    return getattr(mixin, name).__func__ is not getattr(InPlace, name).__func__  # type: ignore[no-any-return]


class Attributes:
    """Plain attributes get other values; class and forward stay."""

    @staticmethod
    def values(op: Op, module: nn.Module) -> Mapping[str, Any]:
        """The new values, for attributes that stand in the module's `__dict__`."""
        raise NotImplementedError


class Weights:
    """Parameters are kept in another way; name, class and forward stay, and they no longer train."""

    @staticmethod
    def values(op: Op, module: nn.Module) -> Mapping[str, torch.Tensor]:
        """What stands for the parameters of these names from then on. Must not change them."""
        raise NotImplementedError

    @staticmethod
    def keeps(op: Op) -> bool:
        """Whether the originals stay in memory, so that there is a way back."""
        return True


class Removal:
    """Parameters are taken away, those that the op says (`Op.drops`): None stands in their place, as in a module that
    was built without them. Name, class and forward stay."""


class Replacement:
    """Another module takes the place, at every path of a tied one."""

    @staticmethod
    def imports(op: Op) -> str | None:
        """The import path that the caller has to permit; the object found there is `build`'s `cls`."""
        return None

    @staticmethod
    def config_values(op: Op, module: nn.Module, config: Any) -> Mapping[str, Any]:
        """What the `config` of the model around `module` says otherwise while the new module is there. Raises `Refusal`
        where it cannot say that."""
        return {}

    @staticmethod
    def build(op: Op, cls: Any, module: nn.Module, device: torch.device) -> nn.Module:
        """The new module. Must not change `module`, nor any tensor of it."""
        raise NotImplementedError
