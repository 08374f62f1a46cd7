"""`layers.drop` on the model that a container is in, the container, and what in its layers knows its place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple, cast

from torch import nn

from ..ops.layers_drop import LayersDrop
from ..ops.op import Op, Refusal
from .layer_lists import PLACES, of_layers, places, refuse_computed
from .rewrite import InPlace


class Without(NamedTuple):
    indices: tuple[int, ...]
    container: str | None
    text: str

    def layers(self, module: nn.Module) -> nn.Module:
        return module.get_submodule(self.container) if self.container else module

    def kept(self, module: nn.Module) -> tuple[int, ...]:
        number = len(self.layers(module)._modules)
        gone = {index % number for index in self.indices}
        return tuple(index for index in range(number) if index not in gone)


class Kept(NamedTuple):
    indices: tuple[int, ...]
    text: str = ""


class Place(NamedTuple):
    name: str
    at: int
    text: str = ""


class Skipping(InPlace):
    """Of the container: only what is left is seen."""

    level: ClassVar[int] = LayersDrop.level
    entries: ClassVar[str] = "_layers_kept"
    _layers_kept: tuple[Kept, ...] = ()

    def _left(self) -> list[nn.Module]:
        held = list(self._modules.values())
        return [cast(nn.Module, held[i]) for i in self._layers_kept[-1].indices]

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self._left()) if self._layers_kept else super().__iter__()  # type: ignore[misc]

    def __len__(self) -> int:
        return len(self._layers_kept[-1].indices) if self._layers_kept else super().__len__()  # type: ignore[misc]

    def __getitem__(self, at: Any) -> Any:
        return self._left()[at] if self._layers_kept else super().__getitem__(at)  # type: ignore[misc]


class Renumbered(InPlace):
    """Of what knows its place among the layers, for a key-value cache."""

    level: ClassVar[int] = LayersDrop.level
    entries: ClassVar[str] = "_layer_place"
    _layer_place: tuple[Place, ...] = ()


def _numbered(name: str) -> property:
    """The attribute of that name, which stays in the module's `__dict__` as it was."""

    def read(self: Renumbered) -> Any:
        own = self.__dict__
        if name not in own:
            raise AttributeError(name)
        return next((place.at for place in reversed(self._layer_place) if place.name == name), own[name])

    return property(read, lambda self, value: self.__dict__.__setitem__(name, value))


for _name in PLACES:
    setattr(Renumbered, _name, _numbered(_name))


class LayersDropped(InPlace):
    """Of the model, or of the container where no config speaks of it."""

    level: ClassVar[int] = LayersDrop.level
    entries: ClassVar[str] = "_layers_drop"
    _layers_drop: tuple[Without, ...] = ()

    @classmethod
    def entry(cls, op: Op, parameter: str | None = None) -> Without:
        drop = cast(LayersDrop, op)
        return Without(drop.indices, drop.container, drop.text())

    @classmethod
    def check(cls, entry: Without, module: nn.Module) -> None:
        layers = entry.layers(module)
        number = len(layers._modules)
        wrong = [index for index in entry.indices if not -number <= index < number]
        if wrong:
            raise Refusal(f"there is no layer {wrong[0]}: the container has {number}", code="GP580")
        if not entry.kept(module):
            raise Refusal("no layer would be left", code="GP580")
        if len({index % number for index in entry.indices}) < len(entry.indices):
            raise Refusal("a layer is named twice, from either end", code="GP580")
        refuse_computed(module.__dict__.get("config"), number, entry.kept(module), "GP580")

    @classmethod
    def config_values(cls, entry: Without, module: nn.Module) -> Mapping[str, Any]:
        number = len(entry.layers(module)._modules)
        return of_layers(module.__dict__.get("config"), number, entry.kept(module))

    @classmethod
    def companions(cls, entry: Without, module: nn.Module) -> Iterable[tuple[nn.Module, type[InPlace], Any]]:
        layers, kept = entry.layers(module), entry.kept(module)
        yield layers, Skipping, Kept(kept)
        held = list(layers._modules.values())
        for place, index in enumerate(kept):
            for part, name in places(cast(nn.Module, held[index]), index) if index != place else ():
                yield part, Renumbered, Place(name, place)
