"""A tree from safetensors headers: names, shapes and dtypes, without torch and without reading a weight.

The format (safetensors' README, "Format"): 8 bytes little-endian length N, then N bytes of JSON
`{"name": {"dtype": "BF16", "shape": [..], "data_offsets": [begin, end]}, "__metadata__": {...}}`. A directory may hold
several files, listed by `model.safetensors.index.json`. Such a tree has no classes, and cannot tell buffers from
parameters.
"""

from __future__ import annotations

import json
import os
from typing import Any, NamedTuple, NoReturn

from ..lang.diagnostics import Diagnostic, Error
from .tree import Signature, Tensor, Tree, index_of

INDEX = "model.safetensors.index.json"
_LONGEST_HEADER = 100_000_000
"""The format's own limit, in bytes."""
_MOST_SEGMENTS = 256
_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu", "F4": "float4_e2m1fn_x2",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool", "C64": "complex64",
}  # fmt: skip


class Header(NamedTuple):
    """What stands at the head of one file."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    missing: int
    """Bytes of the tensors that the header promises, and that the file is too short for."""


def read_headers(path: str) -> Tree:
    """The tree of a safetensors file, an index file, or a directory of them.

    Raises `Error`: GP430 where something cannot be read or is missing, GP436 where it is no safetensors file.
    """
    path = os.fspath(path)
    tensors: dict[str, Tensor] = {}
    for file in _files(path):
        for name, tensor in read_header(file).tensors.items():
            if name in tensors:
                _fail("GP436", f"{file} holds `{name[:200]}`, and so does a file before it")
            tensors[name] = tensor
    if not tensors:
        _fail("GP436", f"{path} holds no tensors")
    tree = tree_of(tensors)
    tree.source = os.path.basename(os.path.normpath(path))
    return tree


def _files(path: str) -> list[str]:
    if not os.path.isdir(path):
        return _listed(path) if path.endswith(".json") else [path]
    index = os.path.join(path, INDEX)
    if os.path.exists(index):
        return _listed(index)
    files = sorted(f for f in os.listdir(path) if f.endswith(".safetensors"))
    if not files:
        _fail("GP430", f"{path} holds no .safetensors file")
    return [os.path.join(path, f) for f in files]


def _listed(index: str) -> list[str]:
    """The files of an index, next to it."""
    try:
        with open(index, "rb") as file:
            listed = json.loads(file.read(_LONGEST_HEADER + 1))
        files = sorted(set(listed["weight_map"].values()))
    except OSError as error:
        _fail("GP430", f"{index} cannot be read: {error.strerror or error}")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        _fail("GP436", f"{index} is not an index of safetensors files: it has no `weight_map` of names to files")
    if not all(isinstance(f, str) and f == os.path.basename(f) and f for f in files):
        _fail("GP436", f"{index} lists files outside its own directory")
    return [os.path.join(os.path.dirname(index), f) for f in files]


def read_header(path: str) -> Header:
    """The header of one safetensors file, which need be there alone. Raises `Error`, GP430 and GP436."""
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _LONGEST_HEADER):
                _fail(
                    "GP436",
                    f"{path} is not a safetensors file: its header is said to have {length} bytes, the file has {size}",
                )
            text = file.read(length)
    except OSError as error:
        _fail("GP430", f"{path} cannot be read: {error.strerror or error}")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        _fail("GP436", f"{path} is not a safetensors file: its header is not JSON")
    if not isinstance(header, dict):
        _fail("GP436", f"{path} is not a safetensors file: its header is not a table of tensors")
    said = header.pop("__metadata__", None)
    metadata = {k: v for k, v in said.items() if isinstance(v, str)} if isinstance(said, dict) else {}
    tensors = {name: _tensor(path, name, entry) for name, entry in header.items()}
    end = max((_end(entry) for entry in header.values()), default=0)
    return Header(tensors, metadata, max(0, end - (size - 8 - length)))


def _end(entry: dict[str, Any]) -> int:
    """Where a tensor's bytes end, counted from the end of the header."""
    offsets = entry.get("data_offsets")
    end = offsets[1] if isinstance(offsets, list) and len(offsets) == 2 else 0
    return end if type(end) is int else 0


def _tensor(path: str, name: str, entry: Any) -> Tensor:
    shape = entry.get("shape") if isinstance(entry, dict) else None
    dtype = entry.get("dtype") if isinstance(entry, dict) else None
    if (
        not isinstance(shape, list)
        or not all(type(n) is int and 0 <= n < 1 << 62 for n in shape)
        or not isinstance(dtype, str)
    ):
        _fail("GP436", f"{path} is not a safetensors file: `{name[:200]}` has no shape and dtype")
    if name.count(".") >= _MOST_SEGMENTS:
        _fail("GP436", f"{path}: the name `{name[:200]}...` has more than {_MOST_SEGMENTS} segments")
    return Tensor(tuple(shape), _DTYPES.get(dtype, dtype.lower()))


def _fail(code: str, title: str) -> NoReturn:
    raise Error(Diagnostic(code, title))


def tree_of(tensors: dict[str, Tensor]) -> Tree:
    """The tree that dotted tensor names make up: numbered children in order, others in order of appearance."""
    root: dict[str, Any] = {}
    own: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        *path, last = name.split(".")
        module = root
        for segment in path:
            module = module.setdefault(segment, {})
        own.setdefault(id(module), {})[last] = tensor
    tree = Tree([], [], [], [], [], [], [])
    interned: dict[Any, int] = {}
    stack: list[tuple[str, int, int, dict[str, Any]]] = [("", -1, 0, root)]
    while stack:
        name, parent, length, module = stack.pop()
        node = len(tree.names)
        parameters = own.get(id(module), {})
        number = interned.setdefault(tuple(parameters.items()), len(interned))
        if number == len(tree.signatures):
            tree.signatures.append(Signature((), parameters=parameters))
        tree.names.append(name)
        tree.parents.append(parent)
        tree.indices.append(index_of(name))
        tree.lengths.append(length if tree.indices[-1] >= 0 else 0)
        tree.signature_of.append(number)
        # Stable, so that names keep their order: those without a number come first.
        children = sorted(module, key=index_of)
        highest = 1 + max(map(index_of, children), default=-1)
        stack += [(child, node, highest, module[child]) for child in reversed(children)]
    tree.ends = list(range(1, len(tree.names) + 1))
    for node in range(len(tree.names) - 1, 0, -1):
        above = tree.parents[node]
        tree.ends[above] = max(tree.ends[above], tree.ends[node])
    return tree
