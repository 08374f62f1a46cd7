"""Safetensors files as a tree, from their headers alone: names, shapes and dtypes, but no classes and no attributes.

The format: 8 bytes, little-endian, that say how long the JSON header is; then the header (safetensors, "Format").
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..tree.tree import Signature, Tensor, Tree, index_of
from .problem import CannotRun, first_line

_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
_LONGEST = 100 * 2**20
"""The longest header that the format allows."""


class _Module:
    """A module as its keys show it."""

    def __init__(self) -> None:
        self.children: dict[str, _Module] = {}
        self.tensors: dict[str, Tensor] = {}


def tree_of_headers(files: list[Path], name: str) -> Tree:
    """The tree of all tensors of these files together; raises `CannotRun` (GP706)."""
    if not files:
        raise CannotRun("GP701", f"{name}: the safetensors files that it speaks of are not there")
    root = _Module()
    seen: dict[str, Path] = {}
    for path in files:
        for key, tensor in _header(path).items():
            if key in seen:
                raise CannotRun(
                    "GP706",
                    f"{key} stands in {seen[key].name} and in {path.name}",
                    "keep one model in a directory, or name one file",
                )
            seen[key] = path
            _place(root, key, tensor, path)
    return _Builder(root, name).tree


def _header(path: Path) -> dict[str, Tensor]:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(_LONGEST, size - 8):
                raise _broken(path, _why_no_header(path))
            header = json.loads(file.read(length))
    except (OSError, ValueError, RecursionError) as error:
        raise _broken(path, first_line(error)) from None
    if not isinstance(header, dict):
        raise _broken(path, "its header is no table")
    header.pop("__metadata__", None)
    return {key: _tensor(path, key, entry) for key, entry in header.items()}


def _tensor(path: Path, key: str, entry: Any) -> Tensor:
    shape = entry.get("shape") if isinstance(entry, dict) else None
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise _broken(path, f"the entry of {key!r} has no shape")
    dtype = str(entry.get("dtype"))
    return Tensor(tuple(shape), _DTYPES.get(dtype, dtype.lower()))


def _why_no_header(path: Path) -> str:
    with path.open("rb") as file:
        if file.read(40).startswith(b"version https://git-lfs"):
            return "it is a Git LFS pointer, and the file itself was never fetched: git lfs pull"
    return "it is cut short, or no safetensors file"


def _broken(path: Path, why: str) -> CannotRun:
    return CannotRun("GP706", f"{path} cannot be read as safetensors", text=(why,))


def _place(root: _Module, key: str, tensor: Tensor, path: Path) -> None:
    *owners, name = key.split(".")
    if not name or not all(owners):
        raise _broken(path, f"{key!r} is no name of a parameter")
    module = root
    for owner in owners:
        module = module.children.setdefault(owner, _Module())
    module.tensors[name] = tensor


class _Builder:
    """Modules to flat arrays, in preorder; a container's children by their index, others as they come."""

    def __init__(self, root: _Module, name: str):
        self.tree = Tree([], [], [], [], [], [], [], source=name)
        self._known: dict[Any, int] = {}
        # (module, name, parent, length of its container), or the node whose subtree ends here.
        stack: list[tuple[_Module, str, int, int] | int] = [(root, "", -1, 0)]
        while stack:
            entry = stack.pop()
            if isinstance(entry, int):
                self.tree.ends[entry] = len(self.tree.names)
                continue
            node = self._add(*entry)
            children = sorted(entry[0].children.items(), key=lambda child: index_of(child[0]))
            length = 1 + max((index_of(name) for name, _ in children), default=-1)
            stack.append(node)
            stack += [
                (child, name, node, length if index_of(name) >= 0 else 0) for name, child in reversed(children)
            ]

    def _add(self, module: _Module, name: str, parent: int, length: int) -> int:
        tree, key = self.tree, tuple(module.tensors.items())
        if key not in self._known:
            self._known[key] = len(tree.signatures)
            tree.signatures.append(Signature((), parameters=dict(module.tensors)))
        tree.names.append(name)
        tree.parents.append(parent)
        tree.indices.append(index_of(name))
        tree.lengths.append(length)
        tree.ends.append(0)
        tree.signature_of.append(self._known[key])
        return len(tree.names) - 1
