"""What modules look like, each look a `Signature` that is made once.

Which entries of a `__dict__` matter is worked out once per layout (class, names and types of the entries).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import nn

from .attributes import ABSENT, SCALARS, as_fact, may_be_fact
from .config import plain_config
from .tree import Attribute, Signature, Tensor, content_of
from .wrappers import EMPTY, WRAPPERS, is_plain

BUFFERS = object()
"""Stands between the parameters and the buffers of a module."""


@dataclass(eq=False, slots=True)
class Layout:
    """What is known of all modules of one shape whose public attributes have the same types."""

    scalars: Callable[[dict[str, Any]], tuple[Any, ...]] | None
    """Takes the scalar attributes out of a `__dict__`; None where all public attributes are scalars."""
    facts: tuple[str, ...]
    """The attributes that are facts, or may turn out to be once converted."""
    others: tuple[str, ...]
    """Those that must be converted: tuples, lists, enums, dtypes."""
    config: bool
    signatures: dict[Any, int]
    """By what tells modules of this layout apart."""


@dataclass(eq=False, slots=True)
class Shape:
    """What is known of all modules of one class whose `__dict__` has the same names."""

    names: tuple[str, ...]
    public: tuple[str, ...]
    read: Callable[[dict[str, Any]], tuple[Any, ...]] | None
    """Takes the public attributes out of a `__dict__`; None where there are none."""
    notes: frozenset[str]
    special: bool
    """Wrapped, patched, or without plain dicts of children and parameters, as a ScriptModule."""
    only_patched: bool
    empty: bool
    layouts: dict[tuple[type, ...], Layout]


class Looks:
    """Shapes, layouts, signatures and configs of one model, as they are found."""

    def __init__(self) -> None:
        self.signatures: list[Signature] = []
        self.configs: list[dict[str, Any]] = []
        self.last: dict[type, Shape] = {}
        """Of each class, the shape that was met last: the next of that class has it, nearly always."""
        self._shapes: dict[tuple[type, tuple[str, ...]], Shape] = {}
        self._interned: dict[Any, int] = {}
        self._mros: dict[type, tuple[str, ...]] = {}
        self._configs: dict[int, int] = {}
        self._configs_by_text: dict[str, int] = {}
        self._kept: list[Any] = []
        """Configs that were looked at, so that no `id` is given twice."""

    def shape(self, module: nn.Module, entries: dict[str, Any]) -> Shape:
        """The shape of a module; the last one of each class is looked at first."""
        cls, names = type(module), tuple(entries)
        shape = self._shapes.get((cls, names))
        if shape is None:
            lineage = {c.__name__ for c in cls.__mro__}
            notes = {note for name, note in (("forward", "forward"), ("_hf_hook", "hf_hook")) if name in entries}
            notes |= {note for name, note in (("FSDPModule", "fsdp"),) if name in lineage}
            if "parametrizations" in (entries.get("_modules") or ()):
                notes.add("parametrized")
            ordinary = lineage.isdisjoint(WRAPPERS) and is_plain(entries)
            public = tuple(name for name in names if name[:1] != "_" and name != "training")
            shape = self._shapes[cls, names] = Shape(
                names=names,
                public=public,
                read=_reader(public),
                notes=frozenset(notes),
                special="_graphpatch" in entries or not ordinary or cls.__qualname__ in EMPTY,
                only_patched="_graphpatch" in entries and ordinary,
                empty=EMPTY.get(cls.__qualname__) == cls.__module__,
                layouts={},
            )
        self.last[cls] = shape
        return shape

    def layout(self, shape: Shape, entries: dict[str, Any]) -> Layout:
        scalars = [name for name in shape.public if type(entries[name]) in SCALARS]
        others = [name for name in shape.public if name not in scalars and may_be_fact(entries[name])]
        all_scalars = len(scalars) == len(shape.public)
        return Layout(
            scalars=None if all_scalars else _reader(scalars) or _nothing,
            facts=tuple(name for name in shape.public if name in scalars or name in others),
            others=tuple(others),
            config="config" in shape.public and _is_config(entries["config"]),
            signatures={},
        )

    def changes(self, layout: Layout, record: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """The marks of a patched module, and what tells it apart beside what it holds: the attributes that patches
        added or changed."""
        added = [name for name in layout.facts if name in record.added]
        told = (*added, *((name, repr(as_fact(value))) for name, value in sorted(record.attributes.items())))
        return tuple(record.marks), told

    def intern(
        self,
        cls: type,
        entries: dict[str, Any],
        shape: Shape,
        layout: Layout,
        tensors: tuple[Any, ...],
        further: tuple[Any, ...],
        record: Any,
    ) -> int:
        """The number of the signature with this content, also where it stands behind other private names."""
        attributes: dict[str, Attribute] = {}
        for name in layout.facts:
            if record is None or name not in record.added:
                changed = record is not None and name in record.attributes
                converted = as_fact(record.attributes[name] if changed else entries[name])
                if converted is not ABSENT:
                    attributes[name] = converted
        parameters, buffers = _tensors(tensors, attributes)
        wrapped = further[0] if further and isinstance(further[0], frozenset) else frozenset()
        signature = Signature(
            mro=self._mro(cls),
            attributes=attributes,
            parameters=parameters,
            buffers=buffers,
            config=self.config(entries["config"]) if layout.config else -1,
            notes=shape.notes | wrapped,
        )
        number = self._interned.setdefault(content_of(signature), len(self.signatures))
        if number == len(self.signatures):
            self.signatures.append(signature)
        return number

    def _mro(self, cls: type) -> tuple[str, ...]:
        found = self._mros.get(cls)
        if found is None:
            base = getattr(cls, "_graphpatch_base", cls)
            lineage = list(base.__mro__[:-1])
            if any(c.__name__ == "FSDPModule" for c in lineage):
                # `fully_shard` made `FSDPLinear(FSDPModule, Linear)`: the class it came from is what rules speak of.
                lineage = [c for c in lineage if not c.__name__.startswith("FSDP")]
            found = self._mros[cls] = tuple(f"{c.__module__}.{c.__qualname__}" for c in lineage)
        return found

    def config(self, config: Any) -> int:
        """The number of a config, converted once per object; equal ones are one."""
        number = self._configs.get(id(config))
        if number is None:
            number = -1
            plain = plain_config(config)
            if plain is not None:
                text = repr(plain)
                number = self._configs_by_text.setdefault(text, len(self.configs))
                if number == len(self.configs):
                    self.configs.append(plain)
            self._configs[id(config)] = number
            self._kept.append(config)
        return number


def _reader(names: Sequence[str]) -> Callable[[dict[str, Any]], tuple[Any, ...]] | None:
    """Takes these entries out of a dict, always as a tuple."""
    if not names:
        return None
    return itemgetter(*names) if len(names) > 1 else itemgetter(names[0], names[0])


def _nothing(entries: dict[str, Any]) -> tuple[Any, ...]:
    return ()


def _is_config(value: Any) -> bool:
    # A module may be called `config`, but then it is a child, not an entry.
    return value is not None and type(value) not in SCALARS and not isinstance(value, (nn.Module, torch.Tensor, type))


def odd_tensor(tensor: Any) -> tuple[Any, Any, bool]:
    """Shape, dtype and `requires_grad` of whatever stands where a tensor should."""
    try:
        return tensor.shape, tensor.dtype, bool(tensor.requires_grad)
    except Exception:  # an UninitializedParameter has no shape yet
        return (), "uninitialized", bool(getattr(tensor, "requires_grad", True))


def _tensors(facts: tuple[Any, ...], attributes: dict[str, Attribute]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters and buffers out of the flat facts of the walk; a parameter that is None becomes an attribute."""
    parameters: dict[str, Tensor] = {}
    buffers: dict[str, Tensor] = {}
    into, at = parameters, 0
    while at < len(facts):
        if facts[at] is BUFFERS:
            into, at = buffers, at + 1
        elif at + 1 == len(facts) or isinstance(facts[at + 1], str) or facts[at + 1] is BUFFERS:
            attributes.setdefault(facts[at], None)
            at += 1
        else:
            name, shape, dtype, trainable = facts[at : at + 4]
            into[name] = Tensor(tuple(map(int, shape)), _dtype(dtype), into is parameters and trainable)
            at += 4
    return parameters, buffers


def _dtype(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
