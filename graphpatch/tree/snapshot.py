"""A live model as a `Tree`: one walk by object identity. The only file of this room that knows torch.

What makes it fast (`benchmarks/matching.py`): nothing is asked of a module but its `__dict__`; which entries of that
matter is worked out once per layout (class, names and types of the entries); what a module looks like is a tuple, and
only a tuple never seen before becomes a `Signature`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import nn

from ..lang.diagnostics import Diagnostic, Error
from .attributes import ABSENT, SCALARS, as_fact, may_be_fact
from .config import plain_config
from .tree import Attribute, Parameter, Signature, Tensor, Tree, content_of, index_of

WRAPPERS = {
    "OptimizedModule": "_orig_mod",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
    "Float16Module": "module",
}
"""Transparent wrappers: class name -> the child that holds the module they wrap."""

EMPTY = dict.fromkeys(("IdentityOp", "IdentityFuncOp"), "megatron.core.transformer.identity_op")
"""What stands where a model has nothing: class name -> the module it is from. Not in the tree, as None is not."""

_BUFFERS = object()
"""Stands between the parameters and the buffers of a module."""


def snapshot(model: nn.Module, as_patched: bool = False) -> Tree:
    """The tree of a live model. Raises `Error` (GP430) for what is no module."""
    if not isinstance(model, nn.Module):
        raise Error(Diagnostic("GP430", f"a tree is taken of a torch.nn.Module, and this is {type(model).__name__}"))
    return _Walk(model, as_patched).tree


@dataclass(eq=False, slots=True)
class _Layout:
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
class _Shape:
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
    layouts: dict[tuple[type, ...], _Layout]


class _Walk:
    def __init__(self, model: nn.Module, as_patched: bool):
        self._as_patched = as_patched
        self._shapes: dict[type, _Shape] = {}
        self._all_shapes: dict[tuple[type, tuple[str, ...]], _Shape] = {}
        self._interned: dict[Any, int] = {}
        self._mros: dict[type, tuple[str, ...]] = {}
        self._configs: dict[int, int] = {}
        self._configs_by_text: dict[str, int] = {}
        self._kept: list[Any] = []
        """What was made on the way, so that no `id` is given twice."""
        self.tree = Tree([], [], [], [], [], [], [], modules=[])
        self._walk(model)

    def _walk(self, model: nn.Module) -> None:
        """The hot loop, in one piece: a call a module costs a tenth of the whole."""
        tree = self.tree
        names, parents, indices, signature_of = tree.names, tree.parents, tree.indices, tree.signature_of
        modules = tree.modules = []
        container_lengths: list[int] = []
        index_of_name = _Indices()
        shapes = self._shapes
        first_place: dict[int, int] = {}
        first_parameter: dict[int, Parameter] = {}
        edges: list[tuple[int, int, str]] = []
        changes: dict[tuple[int, int], tuple[tuple[Any, ...], tuple[Any, ...]]] = {}
        as_patched = self._as_patched
        plain_parameter = nn.Parameter
        stack: list[tuple[str, int, int, Any]] = [("", -1, -1, model)]
        pop, push = stack.pop, stack.append
        node = 0
        while stack:
            name, index, parent, module = pop()
            entries = module.__dict__
            cls = type(module)
            shape = shapes.get(cls)
            if shape is None or shape.names != tuple(entries):
                shape = self._shape(module, entries)
            further: tuple[Any, ...] = ()
            record = None
            if shape.special:
                if shape.empty and parent >= 0:
                    continue
                if shape.only_patched and not as_patched:
                    record = entries["_graphpatch"]
                if record is None or getattr(record, "original", None) is not None:
                    module, entries, shape, wrapped, record = self._unwrap(module, parent < 0)
                    cls = type(module)
                    if wrapped:
                        further = (wrapped,)
            known = first_place.setdefault(id(module), node)
            if known != node:
                edges.append((known, parent, name))
                continue

            children = entries["_modules"]
            highest = -1
            if children:
                for child_name in reversed(children):
                    child = children[child_name]
                    if child is not None and (record is None or child_name not in record.added):
                        at = index_of_name[child_name]
                        push((child_name, at, node, child))
                        if at > highest:
                            highest = at
            container_lengths.append(highest + 1)

            tensors: tuple[Any, ...] = ()
            own = entries["_parameters"]
            if own:
                for own_name, tensor in own.items():
                    if tensor is None and record is not None:
                        tensor = record.dropped.get(own_name)
                    if tensor is None:
                        if record is None or own_name not in record.added:
                            tensors += (own_name,)
                        continue
                    if record is not None and own_name in record.added:
                        continue
                    if type(tensor) is plain_parameter:
                        tensors += (own_name, tensor.shape, tensor.dtype, tensor.requires_grad)
                    else:
                        tensors += (own_name, *_odd_tensor(tensor))
                    me = (node, own_name)
                    first = first_parameter.setdefault(id(tensor), me)
                    if first is not me:
                        tree.ties.append((me, first))
            own = entries["_buffers"]
            if own:
                tensors += (_BUFFERS,)
                for own_name, tensor in own.items():
                    if tensor is not None and (record is None or own_name not in record.added):
                        tensors += (own_name, *_odd_tensor(tensor))

            if shape.read is None:
                values: tuple[Any, ...] = ()
                types: tuple[type, ...] = ()
            else:
                values = shape.read(entries)
                types = tuple(map(type, values))
            layout = shape.layouts.get(types)
            if layout is None:
                layout = shape.layouts[types] = self._layout(shape, entries)
            if layout.scalars is not None:
                values = layout.scalars(entries)
                further += tuple([repr(as_fact(entries[other])) for other in layout.others])
                if layout.config:
                    further += (self._config(entries["config"]),)
            if record is not None:
                # Modules that were patched alike share their record.
                changed = changes.get((id(layout), id(record)))
                if changed is None:
                    changed = changes[id(layout), id(record)] = self._changes(layout, record)
                    self._kept.append(record)
                marks, more = changed
                further += more
                if marks:
                    tree.marks[node] = marks
            key = (values, tensors, further)
            try:
                signature = layout.signatures.get(key, -1)
            except TypeError:  # unhashable, as a shape of symbolic sizes is
                key, signature = None, -1  # type: ignore[assignment]
            if signature < 0:
                signature = self._intern(cls, entries, shape, layout, tensors, further, record)
                if key is not None:
                    layout.signatures[key] = signature

            names.append(name)
            parents.append(parent)
            indices.append(index)
            signature_of.append(signature)
            modules.append(module)
            node += 1

        tree.lengths = [container_lengths[p] if i >= 0 else 0 for p, i in zip(parents, indices)]
        tree.ends = _ends(parents)
        tree.edges = sorted(edges, key=itemgetter(1))
        tree.source = _device(modules)

    # ── what a module looks like ──
    def _shape(self, module: nn.Module, entries: dict[str, Any]) -> _Shape:
        """The shape of a module; the last one of each class is looked at first."""
        cls, names = type(module), tuple(entries)
        shape = self._all_shapes.get((cls, names))
        if shape is None:
            lineage = {c.__name__ for c in cls.__mro__}
            notes = {note for name, note in (("forward", "forward"), ("_hf_hook", "hf_hook")) if name in entries}
            notes |= {note for name, note in (("FSDPModule", "fsdp"),) if name in lineage}
            if "parametrizations" in (entries.get("_modules") or ()):
                notes.add("parametrized")
            ordinary = lineage.isdisjoint(WRAPPERS) and _is_plain(entries)
            public = tuple(name for name in names if name[:1] != "_" and name != "training")
            shape = self._all_shapes[cls, names] = _Shape(
                names=names,
                public=public,
                read=_reader(public),
                notes=frozenset(notes),
                special="_graphpatch" in entries or not ordinary or cls.__qualname__ in EMPTY,
                only_patched="_graphpatch" in entries and ordinary,
                empty=EMPTY.get(cls.__qualname__) == cls.__module__,
                layouts={},
            )
        self._shapes[cls] = shape
        return shape

    def _layout(self, shape: _Shape, entries: dict[str, Any]) -> _Layout:
        scalars = [name for name in shape.public if type(entries[name]) in SCALARS]
        others = [name for name in shape.public if name not in scalars and may_be_fact(entries[name])]
        all_scalars = len(scalars) == len(shape.public)
        return _Layout(
            scalars=None if all_scalars else _reader(scalars) or _nothing,
            facts=tuple(name for name in shape.public if name in scalars or name in others),
            others=tuple(others),
            config="config" in shape.public and _is_config(entries["config"]),
            signatures={},
        )

    def _unwrap(self, module: Any, root: bool) -> tuple[Any, dict[str, Any], _Shape, frozenset[str], Any]:
        """The module that stands for this one in the tree, what it was wrapped in, and its patches' record."""
        wrapped: set[str] = set()
        marks: tuple[Any, ...] = ()
        while True:
            entries = module.__dict__
            inside = _wrapped_by(module)
            if inside is not None:
                wrapped.add(f"wrapped:{type(module).__name__}")
                if root:
                    self.tree.wrappers.append(type(module).__name__)
                module = inside
                continue
            record = None if self._as_patched else entries.get("_graphpatch")
            if record is None or getattr(record, "original", None) is None:
                break
            marks += tuple(record.marks)
            module = record.original
        if not _is_plain(entries):
            entries = _plain(module, entries)
            self._kept.append(entries)
        if marks:
            record = _Record((*marks, *(record.marks if record else ())), record)
        return module, entries, self._shape(module, entries), frozenset(wrapped), record

    def _changes(self, layout: _Layout, record: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """The marks of a patched module, and what tells it apart beside what it holds: the attributes that patches
        added or changed."""
        added = [name for name in layout.facts if name in record.added]
        told = (*added, *((name, repr(as_fact(value))) for name, value in sorted(record.attributes.items())))
        return tuple(record.marks), told

    def _intern(
        self,
        cls: type,
        entries: dict[str, Any],
        shape: _Shape,
        layout: _Layout,
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
            config=self._config(entries["config"]) if layout.config else -1,
            notes=shape.notes | wrapped,
        )
        number = self._interned.setdefault(content_of(signature), len(self.tree.signatures))
        if number == len(self.tree.signatures):
            self.tree.signatures.append(signature)
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

    def _config(self, config: Any) -> int:
        """The number of a config, converted once per object; equal ones are one."""
        number = self._configs.get(id(config))
        if number is None:
            number = -1
            plain = plain_config(config)
            if plain is not None:
                text = repr(plain)
                number = self._configs_by_text.setdefault(text, len(self.tree.configs))
                if number == len(self.tree.configs):
                    self.tree.configs.append(plain)
            self._configs[id(config)] = number
            self._kept.append(config)
        return number


class _Record:
    """The records of a module and of those that took its place, as one."""

    def __init__(self, marks: tuple[Any, ...], inner: Any):
        self.marks = marks
        self.added: Any = inner.added if inner else frozenset()
        self.attributes: dict[str, Any] = inner.attributes if inner else {}
        self.dropped: dict[str, Any] = inner.dropped if inner else {}


class _Indices(dict[str, int]):
    """`index_of`, remembered."""

    def __missing__(self, name: str) -> int:
        self[name] = at = index_of(name)
        return at


def _ends(parents: list[int]) -> list[int]:
    ends = list(range(1, len(parents) + 1))
    for node in range(len(parents) - 1, 0, -1):
        parent = parents[node]
        if ends[parent] < ends[node]:
            ends[parent] = ends[node]
    return ends


# ── values ──


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


def _odd_tensor(tensor: Any) -> tuple[Any, Any, bool]:
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
        if facts[at] is _BUFFERS:
            into, at = buffers, at + 1
        elif at + 1 == len(facts) or isinstance(facts[at + 1], str) or facts[at + 1] is _BUFFERS:
            attributes.setdefault(facts[at], None)
            at += 1
        else:
            name, shape, dtype, trainable = facts[at : at + 4]
            into[name] = Tensor(tuple(map(int, shape)), _dtype(dtype), into is parameters and trainable)
            at += 4
    return parameters, buffers


def _dtype(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _is_plain(entries: dict[str, Any]) -> bool:
    return all(isinstance(entries.get(held), dict) for held in ("_modules", "_parameters", "_buffers"))


def _wrapped_by(module: Any) -> Any:
    """The module in a transparent wrapper; None for any other module."""
    for cls in type(module).__mro__:
        child = WRAPPERS.get(cls.__name__)
        if child is not None:
            children = module.__dict__.get("_modules") or {}
            return children.get(child)
    return None


def _plain(module: Any, entries: dict[str, Any]) -> dict[str, Any]:
    """The `__dict__` of a module that keeps its children otherwise (a ScriptModule) or not at all, as plain dicts."""
    plain = {name: value for name, value in entries.items() if not name.startswith("_") or name == "_graphpatch"}
    plain |= {"_modules": {}, "_parameters": {}, "_buffers": {}}
    for held, ask in (
        ("_modules", "named_children"),
        ("_parameters", "named_parameters"),
        ("_buffers", "named_buffers"),
    ):
        try:
            found = getattr(module, ask)() if ask == "named_children" else getattr(module, ask)(recurse=False)
            plain[held] = dict(found)
        except Exception:  # its __init__ never ran, or it answers in its own way: then it has none that can be named
            pass
    return plain


def _device(modules: Sequence[nn.Module]) -> str:
    """The device of the first parameter or buffer, without its number."""
    for module in modules:
        for held in ("_parameters", "_buffers"):
            for tensor in (module.__dict__.get(held) or {}).values():
                if tensor is not None:
                    return str(tensor.device.type)
    return ""
