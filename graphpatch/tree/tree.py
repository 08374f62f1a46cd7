"""A model as data: flat arrays in preorder, facts interned once per distinct module signature.

A model of 60,000 modules has about eight signatures, so whatever depends on a module's facts alone (validation,
`where`, parameter deltas) is worked out once per signature, not once per module.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple, Union

if TYPE_CHECKING:
    import torch

Scalar = Union[bool, int, float, str, None]
Attribute = Union[Scalar, tuple["Attribute", ...]]


class Tensor(NamedTuple):
    """A parameter or buffer: `dtype` as torch prints it without its prefix (`float32`, `bfloat16`).

    A parameter of a lazy module that was never called has dtype `uninitialized` and an empty shape.
    """

    shape: tuple[int, ...]
    dtype: str
    trainable: bool = True
    """`requires_grad`; no part of a tree's fingerprint."""
    buffer: bool = False
    """Of what an op adds: a persistent buffer, kept and saved with the adapter, and never trained."""

    @property
    def numel(self) -> int:
        return 0 if self.dtype == "uninitialized" else prod(self.shape)


@dataclass(frozen=True)
class Signature:
    """What is the same for every module that looks alike: class, attributes, own parameters and buffers.

    `mro` holds qualified class names, most derived first, without `object`; empty in a tree that has no classes
    (read from safetensors headers). `attributes` are the public instance attributes that are scalars or tuples of
    them (`training` left out), and a parameter that is registered as None (`bias` of a Linear without one).
    `config` indexes `Tree.configs`, -1 where the module has no `config` of its own.
    `notes` are facts that only a live model has and that decide what may be done to it:

    - `forward`: an instance attribute `forward` stands in front of the class's;
    - `hf_hook`: accelerate hooked the module (`_hf_hook`);
    - `fsdp`: sharded by FSDP2's `fully_shard`;
    - `parametrized`: `torch.nn.utils.parametrize` stands in front of a parameter;
    - `wrapped:CLASS`: a transparent wrapper of that class (`OptimizedModule`, `DistributedDataParallel`...) held it.
    """

    mro: tuple[str, ...]
    attributes: Mapping[str, Attribute] = field(default_factory=dict)
    parameters: Mapping[str, Tensor] = field(default_factory=dict)
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    config: int = -1
    notes: frozenset[str] = frozenset()

    @property
    def cls(self) -> str:
        """The class's own name, `Linear`; empty without classes."""
        return self.mro[0].rpartition(".")[2] if self.mro else ""


class Mark(NamedTuple):
    """An op that a patched model already carries at a node."""

    patch: str
    """The id of the patch."""
    rule: str
    """Where its rule stands, `lora.rules:5`."""
    op: str
    """The op as text, `lora(rank=16)`."""
    slots: frozenset[str]
    exclusive: bool = False


Parameter = tuple[int, str]
"""A parameter: the node that owns it, and its name there."""

Segment = tuple[str, int, int]
"""One step down a path: the name, the integer it is (else -1), and the length of its container (else 0)."""


def index_of(name: str) -> int:
    """The integer a path segment is, else -1: `5` is one, `05`, `+5` and what has over nine digits are names."""
    if not name.isdecimal() or not name.isascii() or len(name) > 9 or (name[0] == "0" and name != "0"):
        return -1
    return int(name)


def content_of(signature: Signature) -> tuple[object, ...]:
    """A signature as something to look it up by. Attributes count as they are written, since `1 == True == 1.0`."""
    return (
        signature.mro,
        tuple((name, repr(value)) for name, value in signature.attributes.items()),
        tuple(signature.parameters.items()),
        tuple(signature.buffers.items()),
        signature.config,
        signature.notes,
    )


@dataclass(eq=False)
class Tree:
    """Modules in preorder, as parallel lists indexed by node; node 0 is the root.

    A module that stands under several names is one node, at its first path; each further place is an edge. The
    arrays of a patched model describe the original model: what patches added is left out, and `marks` tells of it.
    Wrappers (`torch.compile`, DDP) are no nodes: the module inside stands in their place.
    """

    names: list[str]
    """The last path segment; the root's is empty."""
    parents: list[int]
    """The parent node; the root's is -1."""
    indices: list[int]
    """The segment as an integer where it is one (`layers.5` -> 5; global, on a pipeline stage too), else -1."""
    lengths: list[int]
    """Of the container the node stands in: highest index plus one, over the whole model; 0 where `indices` is -1."""
    ends: list[int]
    """One past the last node of the subtree: the subtree of `i` is `range(i, ends[i])`."""
    signature_of: list[int]
    signatures: list[Signature]
    configs: list[dict[str, Any]] = field(default_factory=list)
    edges: list[tuple[int, int, str]] = field(default_factory=list)
    """(node, parent, name): a further place of a module, beside its first path; sorted by parent. One that leads back
    to an ancestor is kept, but is no path: a path never goes through a module twice."""
    ties: list[tuple[Parameter, Parameter]] = field(default_factory=list)
    """(alias, first): the alias is the same tensor as the first; both stand in their signature's `parameters`."""
    marks: dict[int, tuple[Mark, ...]] = field(default_factory=dict)
    source: str = ""
    """Where it came from, for headings: `meta`, `cpu`, a file name."""
    wrappers: list[str] = field(default_factory=list)
    """Class names of the wrappers around the root, outermost first."""
    modules: list[torch.nn.Module] | None = field(default=None, repr=False)
    """The live modules, node by node, in a tree taken from a model; None in one read from a file."""

    # ── construction ──
    @classmethod
    def of(cls, model: torch.nn.Module, *, as_patched: bool = False) -> Tree:
        """The tree of a live model (on any device, meta too). Raises `Error` (GP430) for what is no module.

        A patched model's tree is that of the original model; `as_patched` takes it as it stands, without marks.
        """
        from .snapshot import snapshot

        return snapshot(model, as_patched)

    @classmethod
    def read(cls, path: str) -> Tree:
        """A tree from a `.tree` file. Raises `Error` (GP43x) with file and line where it is none."""
        from .text import read

        return read(path)

    def write(self, path: str) -> None:
        """Write the `.tree` text form. Raises `Error` (GP430) where the file cannot be written."""
        from .text import write

        write(self, path)

    @classmethod
    def from_text(cls, text: str, name: str = "text.tree") -> Tree:
        """The inverse of `to_text`; `name` is for messages."""
        from .text import parse

        return parse(text, name)

    def to_text(self) -> str:
        """The text form: readable, diffable, read back exactly (all but `modules`)."""
        from .text import render

        return render(self)

    # ── reading ──
    def __len__(self) -> int:
        return len(self.names)

    @property
    def title(self) -> str:
        """The root's class name."""
        return self.signatures[self.signature_of[0]].cls

    @property
    def has_classes(self) -> bool:
        return bool(self.signatures[self.signature_of[0]].mro)

    def signature(self, node: int) -> Signature:
        return self.signatures[self.signature_of[node]]

    @cached_property
    def paths(self) -> list[str]:
        """The first path of every node, `model.layers.0.mlp`; the root's is empty."""
        paths = [""]
        add = paths.append
        for name, parent in zip(self.names[1:], self.parents[1:]):
            add(f"{paths[parent]}.{name}" if parent else name)
        return paths

    @cached_property
    def name_counts(self) -> Counter[str]:
        """How many nodes bear each name."""
        return Counter(self.names)

    @cached_property
    def places(self) -> dict[int, list[tuple[int, str]]]:
        """The further places (parent, name) of each tied module: its edges, less those back to an ancestor."""
        places: dict[int, list[tuple[int, str]]] = {}
        for node, parent, name in self.edges:
            if not node <= parent < self.ends[node]:
                places.setdefault(node, []).append((parent, name))
        return places

    def all_paths(self, node: int, limit: int = 10_000) -> list[str]:
        """Every path of a node, first first; at most `limit`, since paths through tied modules multiply."""
        first = self.paths[node]
        if not self.edges:
            return [first]
        found = {first: None}
        # Climb with the tail gathered so far, and the modules on it: ties may go round in a ring, a path may not. A
        # climb that only meets itself finds nothing, so it is counted too.
        climb: list[tuple[int, str, frozenset[int]]] = [(node, "", frozenset())]
        climbed = 0
        while climb and len(found) < limit and climbed < 10 * limit:
            climbed += 1
            at, tail, below = climb.pop()
            if at == 0:
                found[tail[:-1]] = None
                continue
            below |= {at}
            above = [(self.parents[at], self.names[at]), *self._above.get(at, ())]
            climb += [(parent, f"{name}.{tail}", below) for parent, name in reversed(above) if parent not in below]
        return list(found)

    @cached_property
    def _above(self) -> dict[int, list[tuple[int, str]]]:
        """The (parent, name) of each edge, by the module that it leads to."""
        above: dict[int, list[tuple[int, str]]] = {}
        for node, parent, name in self.edges:
            above.setdefault(node, []).append((parent, name))
        return above

    def parameter_paths(self, parameter: Parameter) -> list[str]:
        """Every path of a parameter, first first, those of its ties included."""
        same = [parameter, *(alias for alias, first in self.ties if first == parameter)]
        return [f"{path}.{name}" if path else name for node, name in same for path in self.all_paths(node)]

    def find(self, path: str) -> int | None:
        """The node of a path, any of its paths."""
        node = 0
        for name in path.split(".") if path else ():
            found = self._children[node].get(name)
            if found is None:
                return None
            node = found
        return node

    def find_parameter(self, path: str) -> Parameter | None:
        """The parameter of a path, any of its paths; a tied one as its first."""
        owner, _, name = path.rpartition(".")
        node = self.find(owner)
        if node is None or name not in self.signature(node).parameters:
            return None
        return self.first_of.get((node, name), (node, name))

    @cached_property
    def first_of(self) -> dict[Parameter, Parameter]:
        """The first of each tied parameter, by its aliases."""
        return dict(self.ties)

    @cached_property
    def _children(self) -> list[dict[str, int]]:
        children: list[dict[str, int]] = [{} for _ in self.names]
        for node in range(1, len(self.names)):
            children[self.parents[node]][self.names[node]] = node
        for node, parent, name in self.edges:
            children[parent].setdefault(name, node)
        return children

    def children(self, node: int) -> list[int]:
        """The nodes right below, at their first paths, in order."""
        children, at = [], node + 1
        while at < self.ends[node]:
            children.append(at)
            at = self.ends[at]
        return children

    def ancestors(self, node: int) -> list[int]:
        """The nodes from the root down to `node`, both included, along its first path."""
        chain = []
        while node >= 0:
            chain.append(node)
            node = self.parents[node]
        return chain[::-1]

    def config_of(self, node: int) -> dict[str, Any] | None:
        """The config of the nearest enclosing module that has one, the node itself included."""
        while node >= 0:
            config = self.signatures[self.signature_of[node]].config
            if config >= 0:
                return self.configs[config]
            node = self.parents[node]
        return None

    # ── segments ──
    @cached_property
    def kinds(self) -> tuple[list[int], list[tuple[Segment, int]]]:
        """What a selector may ask of a node, interned: the kind of each node, and (segment, signature) of each kind."""
        interned: dict[tuple[str, int, int], int] = {}
        add = interned.setdefault
        # A name fixes its index, so the length is all that a segment needs besides.
        kinds = [add(key, len(interned)) for key in zip(self.names, self.lengths, self.signature_of)]
        return kinds, [((name, index_of(name), length), sig) for name, length, sig in interned]

    @cached_property
    def shapes(self) -> list[int]:
        """A number for each node, equal for paths that differ in their indices alone."""
        kinds, table = self.kinds
        # Indices are open: all of them are one word.
        words: dict[str | None, int] = {}
        word = [words.setdefault(name if index < 0 else None, len(words)) for (name, index, _), _ in table]
        interned: dict[int, int] = {}
        add, size = interned.setdefault, len(words)
        shapes = [0]
        push = shapes.append
        for parent, kind in zip(self.parents[1:], kinds[1:]):
            push(add(shapes[parent] * size + word[kind], len(interned) + 1))
        return shapes

    def edge_segment(self, parent: int, name: str) -> Segment:
        """The segment of a further place of a module."""
        index = index_of(name)
        return (name, index, self._edge_lengths[parent] if index >= 0 else 0)

    @cached_property
    def _edge_lengths(self) -> dict[int, int]:
        """Of each container that holds an edge: highest index plus one, or what its children say it is."""
        lengths: dict[int, int] = {}
        for _, parent, name in self.edges:
            lengths[parent] = max(lengths.get(parent, 0), index_of(name) + 1)
        for parent in lengths:
            lengths[parent] = max([lengths[parent], *(self.lengths[child] for child in self.children(parent))])
        return lengths

    # ── sums ──
    @cached_property
    def fingerprint(self) -> str:
        """A hash over paths, edges, ties, classes, attributes, shapes, dtypes; not over `trainable`, marks, notes."""
        digest = sha256(b"graphpatch tree 1\n")
        facts: dict[str, int] = {}
        # Signatures that differ only in what does not count get one number, given in order of first appearance.
        number = []
        for signature in self.signatures:
            said = repr(
                (
                    signature.mro,
                    sorted(signature.attributes.items()),
                    [(name, tuple(t.shape), t.dtype) for name, t in signature.parameters.items()],
                    [(name, tuple(t.shape), t.dtype) for name, t in signature.buffers.items()],
                )
            )
            number.append(facts.setdefault(said, len(facts)))
        for part in (
            "\n".join(facts),
            ",".join(map(str, map(number.__getitem__, self.signature_of))),
            "\0".join(self.names),
            repr(self.parents),
            repr(self.lengths),
            repr(self.edges),
            repr(self.ties),
        ):
            digest.update(part.encode("utf-8", "surrogatepass"))
            digest.update(b"\n")
        return digest.hexdigest()

    def numel(self, nodes: Iterable[int] | None = None) -> int:
        """Parameters (of all nodes, or of these), tied ones once."""
        own = [sum(t.numel for t in signature.parameters.values()) for signature in self.signatures]
        counted = range(len(self)) if nodes is None else set(nodes)
        kinds = self.signature_of if nodes is None else [self.signature_of[node] for node in counted]
        total = sum(own[kind] * times for kind, times in Counter(kinds).items())
        seen: set[Parameter] = set()
        for (node, name), first in self.ties:
            if node in counted:
                if first[0] in counted or first in seen:
                    total -= self.signature(node).parameters[name].numel
                seen.add(first)
        return total
