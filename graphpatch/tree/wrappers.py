"""What stands before a module in a live model: transparent wrappers, and what a patch put in its place."""

from __future__ import annotations

from typing import Any, NamedTuple

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


class Unwrapped(NamedTuple):
    """The module that stands for another in the tree."""

    module: Any
    entries: dict[str, Any]
    """Its `__dict__`, with plain dicts of children, parameters and buffers."""
    wrappers: tuple[str, ...]
    """The classes of what it was wrapped in, the outermost first."""
    record: Any
    """Of its patches; None where there are none, or the model is looked at as they left it."""


def unwrapped(module: Any, as_patched: bool) -> Unwrapped:
    wrappers: list[str] = []
    marks: tuple[Any, ...] = ()
    while True:
        entries = module.__dict__
        inside = wrapped_by(module)
        if inside is not None:
            wrappers.append(type(module).__name__)
            module = inside
            continue
        record = None if as_patched else entries.get("_graphpatch")
        if record is None or getattr(record, "original", None) is None:
            break
        marks += tuple(record.marks)
        module = record.original
    if not is_plain(entries):
        entries = _plain(module, entries)
    if marks:
        record = _Record((*marks, *(record.marks if record else ())), record)
    return Unwrapped(module, entries, tuple(wrappers), record)


class _Record:
    """The records of a module and of those that took its place, as one."""

    def __init__(self, marks: tuple[Any, ...], inner: Any):
        self.marks = marks
        self.added: Any = inner.added if inner else frozenset()
        self.attributes: dict[str, Any] = inner.attributes if inner else {}
        self.dropped: dict[str, Any] = inner.dropped if inner else {}


def is_plain(entries: dict[str, Any]) -> bool:
    return all(isinstance(entries.get(held), dict) for held in ("_modules", "_parameters", "_buffers"))


def wrapped_by(module: Any) -> Any:
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
