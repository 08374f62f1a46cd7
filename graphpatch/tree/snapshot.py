"""A live model as a `Tree`: one walk by object identity. What a module looks like and what stands before it are in
looks.py and wrappers.py. This and looks.py are the only files of this room that know torch.

What makes it fast (`benchmarks/matching.py`): nothing is asked of a module but its `__dict__`; which entries of that
matter is worked out once per layout; what a module looks like is a tuple, and only a tuple never seen before becomes a
`Signature`.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import Any

from torch import nn

from ..lang.diagnostics import Diagnostic, Error
from .attributes import as_fact
from .looks import BUFFERS, Looks, odd_tensor
from .tree import Parameter, Tree, index_of
from .wrappers import unwrapped


def snapshot(model: nn.Module, as_patched: bool = False) -> Tree:
    """The tree of a live model. Raises `Error` (GP430) for what is no module."""
    if not isinstance(model, nn.Module):
        raise Error(Diagnostic("GP430", f"a tree is taken of a torch.nn.Module, and this is {type(model).__name__}"))
    return _walk(model, as_patched)


def _walk(model: nn.Module, as_patched: bool) -> Tree:
    """The hot loop, in one piece: a call a module costs a tenth of the whole."""
    looks = Looks()
    tree = Tree([], [], [], [], [], [], looks.signatures, modules=[], configs=looks.configs)
    names, parents, indices, signature_of = tree.names, tree.parents, tree.indices, tree.signature_of
    modules = tree.modules = []
    container_lengths: list[int] = []
    index_of_name = _Indices()
    shapes = looks.last
    kept: list[Any] = []  # what was made on the way, so that no `id` is given twice
    first_place: dict[int, int] = {}
    first_parameter: dict[int, Parameter] = {}
    edges: list[tuple[int, int, str]] = []
    changes: dict[tuple[int, int], tuple[tuple[Any, ...], tuple[Any, ...]]] = {}
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
            shape = looks.shape(module, entries)
        further: tuple[Any, ...] = ()
        record = None
        if shape.special:
            if shape.empty and parent >= 0:
                continue
            if shape.only_patched and not as_patched:
                record = entries["_graphpatch"]
            if record is None or getattr(record, "original", None) is not None:
                module, entries, wrappers, record = unwrapped(module, as_patched)
                cls, shape = type(module), looks.shape(module, entries)
                kept.append(entries)
                if wrappers:
                    further = (frozenset(f"wrapped:{wrapper}" for wrapper in wrappers),)
                    if parent < 0:
                        tree.wrappers += wrappers
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
                    tensors += (own_name, *odd_tensor(tensor))
                me = (node, own_name)
                first = first_parameter.setdefault(id(tensor), me)
                if first is not me:
                    tree.ties.append((me, first))
        own = entries["_buffers"]
        if own:
            tensors += (BUFFERS,)
            for own_name, tensor in own.items():
                if tensor is not None and (record is None or own_name not in record.added):
                    tensors += (own_name, *odd_tensor(tensor))

        if shape.read is None:
            values: tuple[Any, ...] = ()
            types: tuple[type, ...] = ()
        else:
            values = shape.read(entries)
            types = tuple(map(type, values))
        layout = shape.layouts.get(types)
        if layout is None:
            layout = shape.layouts[types] = looks.layout(shape, entries)
        if layout.scalars is not None:
            values = layout.scalars(entries)
            further += tuple([repr(as_fact(entries[other])) for other in layout.others])
            if layout.config:
                further += (looks.config(entries["config"]),)
        if record is not None:
            # Modules that were patched alike share their record.
            changed = changes.get((id(layout), id(record)))
            if changed is None:
                changed = changes[id(layout), id(record)] = looks.changes(layout, record)
                kept.append(record)
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
            signature = looks.intern(cls, entries, shape, layout, tensors, further, record)
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
    return tree


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


def _device(modules: Sequence[nn.Module]) -> str:
    """The device of the first parameter or buffer, without its number."""
    for module in modules:
        for held in ("_parameters", "_buffers"):
            for tensor in (module.__dict__.get(held) or {}).values():
                if tensor is not None:
                    return str(tensor.device.type)
    return ""
