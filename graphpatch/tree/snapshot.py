"""A live model as a `Tree`: one walk by object identity. The only file of this room that knows torch.

What makes it fast (`benchmarks/matching.py`): nothing is asked of a module but its `__dict__`; which entries of that
matter is worked out once per layout (class, names and types of the entries); what a module looks like is a tuple, and
only a tuple never seen before becomes a `Signature`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from operator import itemgetter
from typing import Any, Callable, Iterable

import torch
from torch import nn

from ..lang.diagnostics import Diagnostic, Error
from .config import plain_config
from .tree import Attribute, Parameter, Signature, Tensor, Tree, index_of

WRAPPERS = {
    "OptimizedModule": "_orig_mod",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
    "Float16Module": "module",
}
"""Transparent wrappers: class name -> the child that holds the module they wrap."""

_SCALARS = {bool, int, float, str, type(None)}
_DEAF = (torch.device, torch.Generator, nn.Module, torch.Tensor)
_LONGEST = 4096
"""Tuples and strings longer than this are data, not facts about a module: left out."""
_ABSENT = object()


def snapshot(model: nn.Module) -> Tree:
    """The tree of a live model. Raises `Error` (GP430) for what is no module."""
    if not isinstance(model, nn.Module):
        raise Error(Diagnostic("GP430", f"a tree is taken of a torch.nn.Module, and this is {type(model).__name__}"))
    return _Walk(model).tree


@dataclass(eq=False, slots=True)
class _Layout:
    """What is known of all modules of one class whose `__dict__` has the same names with the same types.

    Compared by identity: one object for each class and layout.
    """

    read: Callable[[dict[str, Any]], Any] | None
    """Takes the scalars out of a `__dict__`."""
    scalars: tuple[str, ...]
    others: tuple[str, ...]
    """Attributes that may turn out to be facts once converted: tuples, lists, enums, dtypes."""
    config: bool
    notes: frozenset[str]
    wraps: str | None
    """The child that this transparent wrapper holds."""
    patched: bool
    plain: bool
    """False where `_modules` and its like are no plain dicts, as in a ScriptModule."""


class _Walk:
    def __init__(self, model: nn.Module):
        self._layouts: dict[Any, _Layout] = {}
        self._raw: dict[Any, int] = {}
        self._interned: dict[Any, int] = {}
        self._mros: dict[type, tuple[str, ...]] = {}
        self._configs: dict[int, int] = {}
        self._configs_by_text: dict[str, int] = {}
        self._kept: list[Any] = []
        self.tree = Tree([], [], [], [], [], [], [], modules=[])
        self._walk(model)

    def _walk(self, model: nn.Module) -> None:
        tree = self.tree
        names, parents, indices, signature_of, modules = (
            tree.names,
            tree.parents,
            tree.indices,
            tree.signature_of,
            tree.modules,
        )
        assert modules is not None
        container_lengths: list[int] = []
        index = _Indices()
        layouts, raw = self._layouts, self._raw
        first_place: dict[int, int] = {}
        first_parameter: dict[int, Parameter] = {}
        edges: list[tuple[int, int, str]] = []
        plain_parameter = nn.Parameter
        stack: list[tuple[str, int, Any]] = [("", -1, model)]
        pop, push = stack.pop, stack.append
        while stack:
            name, parent, module = pop()
            entries = module.__dict__
            key = (module.__class__, *entries, *map(type, entries.values()))
            layout = layouts.get(key)
            if layout is None:
                layout = layouts[key] = self._layout(module, entries)
            extra: frozenset[str] | None = None
            record = None
            if layout.wraps or layout.patched or not layout.plain:
                module, entries, layout, extra, record = self._unwrap(module, parent < 0)
            known = first_place.setdefault(id(module), len(names))
            if known != len(names):
                edges.append((known, parent, name))
                continue
            node = known

            children = entries["_modules"]
            highest = -1
            if children:
                added: Iterable[str] = record.added if record is not None else ()
                for child_name in reversed(children):
                    child = children[child_name]
                    if child is not None and child_name not in added:
                        push((child_name, node, child))
                        at = index[child_name]
                        if at > highest:
                            highest = at
            container_lengths.append(highest + 1)

            facts: tuple[Any, ...] = ()
            own = entries["_parameters"]
            if own:
                for parameter_name, parameter in own.items():
                    if record is not None and parameter_name in record.added:
                        continue
                    if parameter is None:
                        facts += (parameter_name, None)
                        continue
                    if parameter.__class__ is plain_parameter:
                        facts += (parameter_name, parameter.shape, parameter.dtype, parameter.requires_grad)
                    else:
                        facts += (parameter_name, *_odd_tensor(parameter))
                    me = (node, parameter_name)
                    other = first_parameter.setdefault(id(parameter), me)
                    if other is not me:
                        tree.ties.append((me, other))
            buffers: tuple[Any, ...] = ()
            own = entries["_buffers"]
            if own:
                for buffer_name, buffer in own.items():
                    if buffer is not None and (record is None or buffer_name not in record.added):
                        buffers += (buffer_name, *_odd_tensor(buffer))

            read = layout.read
            raw_key = (
                layout if record is None else self._patched_key(layout, entries, record, node),
                None if read is None else read(entries),
                facts,
                buffers,
                extra,
                self._config(entries["config"]) if layout.config else -1,
            )
            if layout.others:
                raw_key += tuple([_convert(entries[other]) for other in layout.others])  # type: ignore[assignment]
            try:
                signature = raw.get(raw_key)
            except TypeError:  # unhashable, as a shape of symbolic sizes is
                raw_key, signature = None, None  # type: ignore[assignment]
            if signature is None:
                signature = self._intern(module, entries, layout, facts, buffers, extra, record)
                if raw_key is not None:
                    raw[raw_key] = signature

            names.append(name)
            parents.append(parent)
            indices.append(index[name])
            signature_of.append(signature)
            modules.append(module)

        tree.lengths = [container_lengths[p] if i >= 0 else 0 for p, i in zip(parents, indices)]
        tree.ends = _ends(parents)
        tree.edges = sorted(edges, key=itemgetter(1))
        tree.source = _device(model)

    # ── what a module looks like ──
    def _layout(self, module: nn.Module, entries: dict[str, Any]) -> _Layout:
        scalars, others, config = [], [], False
        for name, value in entries.items():
            if name == "config" and _is_config(value):
                config = True
            if name.startswith("_") or name == "training":
                continue
            if type(value) in _SCALARS:
                scalars.append(name)
            elif not callable(value) and not isinstance(value, _DEAF) and _may_convert(value):
                others.append(name)
        notes = set()
        if "forward" in entries:
            notes.add("forward")
        if "_hf_hook" in entries:
            notes.add("hf_hook")
        lineage = [c.__name__ for c in type(module).__mro__]
        if "FSDPModule" in lineage:
            notes.add("fsdp")
        if "parametrizations" in (entries.get("_modules") or ()):
            notes.add("parametrized")
        wraps = next((WRAPPERS[n] for n in lineage if n in WRAPPERS), None)
        modules = entries.get("_modules")
        if wraps is not None and (not modules or modules.get(wraps) is None):
            wraps = None
        return _Layout(
            read=itemgetter(*scalars) if scalars else None,
            scalars=tuple(scalars),
            others=tuple(others),
            config=config,
            notes=frozenset(notes),
            wraps=wraps,
            patched="_graphpatch" in entries,
            plain=all(type(entries.get(n)) is dict for n in ("_modules", "_parameters", "_buffers")),
        )

    def _unwrap(
        self, module: Any, root: bool
    ) -> tuple[Any, dict[str, Any], _Layout, frozenset[str] | None, Any]:
        """The module that stands for this one in the tree, and what was met on the way to it."""
        through: set[str] = set()
        marks: tuple[Any, ...] = ()
        while True:
            entries = module.__dict__
            layout = self._layout(module, entries)
            if layout.wraps:
                through.add(type(module).__name__)
                if root:
                    self.tree.wrappers.append(type(module).__name__)
                module = entries["_modules"][layout.wraps]
                continue
            record = entries.get("_graphpatch") if layout.patched else None
            if record is None or getattr(record, "original", None) is None:
                break
            marks += tuple(record.marks)
            module = record.original
        if not layout.plain:
            entries = _plain(module, entries)
            self._kept.append(entries)
            layout = self._layout(module, entries)
        if marks:
            record = _Record((*marks, *(record.marks if record else ())), record)
        notes = frozenset(f"wrapped:{name}" for name in through)
        key = (type(module), *entries, *map(type, entries.values()))
        layout = self._layouts.setdefault((key, "inner"), layout)
        return module, entries, layout, notes or None, record

    def _patched_key(self, layout: _Layout, entries: dict[str, Any], record: Any, node: int) -> Any:
        """What tells patched modules of one layout apart, beside what they hold: which attributes patches changed."""
        if record.marks:
            self.tree.marks[node] = tuple(record.marks)
        changed = record.attributes
        if not changed and not any(name in record.added for name in (*layout.scalars, *layout.others)):
            return layout
        return (layout, frozenset(record.added), *((n, type(v), _convert(v)) for n, v in sorted(changed.items())))

    def _intern(
        self,
        module: nn.Module,
        entries: dict[str, Any],
        layout: _Layout,
        facts: tuple[Any, ...],
        buffers: tuple[Any, ...],
        extra: frozenset[str] | None,
        record: Any,
    ) -> int:
        """The number of the signature with this content; the same content behind other private names is one signature."""
        attributes: dict[str, Attribute] = {}
        for name, value in entries.items():
            if name in layout.scalars or name in layout.others:
                if record is not None and name in record.added:
                    continue
                if record is not None and name in record.attributes:
                    value = record.attributes[name]
                converted = _convert(value)
                if converted is not _ABSENT:
                    attributes[name] = converted
        parameters: dict[str, Tensor] = {}
        at = 0
        while at < len(facts):
            if facts[at + 1] is None:
                attributes.setdefault(facts[at], None)
                at += 2
            else:
                name, shape, dtype, trainable = facts[at : at + 4]
                parameters[name] = Tensor(_shape(shape), _dtype(dtype), trainable)
                at += 4
        signature = Signature(
            mro=self._mro(type(module)),
            attributes=attributes,
            parameters=parameters,
            buffers={
                buffers[i]: Tensor(_shape(buffers[i + 1]), _dtype(buffers[i + 2]), False)
                for i in range(0, len(buffers), 4)
            },
            config=self._config(entries["config"]) if layout.config else -1,
            notes=layout.notes | extra if extra else layout.notes,
        )
        content = (
            signature.mro,
            # `1 == True == 1.0`, so the values count as they are written.
            tuple((name, repr(value)) for name, value in attributes.items()),
            tuple(parameters.items()),
            tuple(signature.buffers.items()),
            signature.config,
            signature.notes,
        )
        number = self._interned.setdefault(content, len(self.tree.signatures))
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


def _may_convert(value: Any) -> bool:
    return isinstance(value, (bool, int, float, str, tuple, list, Enum, torch.dtype))


def _convert(value: Any) -> Any:
    """A value as a scalar or a tuple of scalars; `_ABSENT` where it is none."""
    kind = type(value)
    if kind in _SCALARS:
        return value if kind is not str or len(value) <= _LONGEST else _ABSENT
    if isinstance(value, torch.dtype):
        return _dtype(value)
    if isinstance(value, Enum):
        return _convert(value.value) if type(value.value) in _SCALARS else value.name
    for plain in (bool, int, float, str):
        if isinstance(value, plain):
            return plain(value)
    if isinstance(value, (tuple, list)) and len(value) <= _LONGEST:
        items = tuple([_convert(item) for item in value])
        return _ABSENT if any(item is _ABSENT for item in items) else items
    return _ABSENT


def _is_config(value: Any) -> bool:
    # A module may be called `config`, but then it is a child, not an entry.
    return value is not None and type(value) not in _SCALARS and not isinstance(value, (nn.Module, torch.Tensor, type))


def _odd_tensor(tensor: Any) -> tuple[Any, Any, bool]:
    """Shape, dtype and `requires_grad` of whatever stands where a tensor should."""
    try:
        return tensor.shape, tensor.dtype, bool(tensor.requires_grad)
    except Exception:  # an UninitializedParameter has no shape yet
        return (), "uninitialized", bool(getattr(tensor, "requires_grad", True))


def _shape(shape: Iterable[Any]) -> tuple[int, ...]:
    return tuple(int(size) for size in shape)


def _dtype(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


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


def _device(model: nn.Module) -> str:
    """The device of the first parameter or buffer, without its number."""
    for module in model.modules():
        for tensors in (module.__dict__.get("_parameters"), module.__dict__.get("_buffers")):
            for tensor in (tensors or {}).values():
                if tensor is not None:
                    return str(tensor.device.type)
    return ""
