"""A model as data: flat arrays in preorder, facts interned once per distinct module signature.

A model of 60,000 modules has about eight signatures, so whatever depends on a module's facts alone (validation,
`where`, parameter deltas) is worked out once per signature, not once per module.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Iterable, Mapping, NamedTuple

if TYPE_CHECKING:
    import torch

Scalar = bool | int | float | str | None
Attribute = Scalar | tuple["Attribute", ...]


class Tensor(NamedTuple):
    """A parameter or buffer: `dtype` as torch prints it without its prefix (`float32`, `bfloat16`)."""

    shape: tuple[int, ...]
    dtype: str
    trainable: bool = True
    """`requires_grad`; no part of a tree's fingerprint."""

    @property
    def numel(self) -> int: ...


@dataclass(frozen=True)
class Signature:
    """What is the same for every module that looks alike: class, attributes, own parameters and buffers.

    `mro` holds qualified class names, most derived first, without `object`; empty in a tree that has no classes
    (read from safetensors headers). `attributes` are the public instance attributes that are scalars or tuples of
    them (`training` left out). `config` indexes `Tree.configs`, -1 where the module has no `config` of its own.
    `notes` are facts that only a live model has and that decide what may be done to it (`forward-override`, `hooked`...).
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


@dataclass(eq=False)
class Tree:
    """Modules in preorder, as parallel lists indexed by node; node 0 is the root.

    A module that stands under several names is one node, at its first path; each further place is an edge. The
    arrays of a patched model describe the original model: what patches added is left out, and `marks` tells of it.
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
    """(node, parent, name): a further place of a module, beside its first path."""
    ties: list[tuple[Parameter, Parameter]] = field(default_factory=list)
    """(alias, first): the alias is the same tensor as the first; both stand in their signature's `parameters`."""
    marks: dict[int, tuple[Mark, ...]] = field(default_factory=dict)
    source: str = ""
    """Where it came from, for headings: `meta`, `cpu`, a file name."""
    modules: list[torch.nn.Module] | None = field(default=None, repr=False)
    """The live modules, node by node, in a tree taken from a model; None in one read from a file."""

    # ── construction ──
    @classmethod
    def of(cls, model: torch.nn.Module) -> Tree:
        """The tree of a live model (on any device, meta too)."""
        from .snapshot import snapshot

        return snapshot(model)

    @classmethod
    def read(cls, path: str) -> Tree: ...

    def write(self, path: str) -> None: ...

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
        ...

    def all_paths(self, node: int) -> list[str]:
        """Every path of a node, first first."""
        ...

    def find(self, path: str) -> int | None:
        """The node of a path, any of its paths."""
        ...

    def children(self, node: int) -> list[int]:
        ...

    def config_of(self, node: int) -> dict[str, Any] | None:
        """The config of the nearest enclosing module that has one, the node itself included."""
        ...

    @cached_property
    def fingerprint(self) -> str:
        """A hash over paths, edges, ties, classes, attributes, shapes and dtypes; not over `trainable`, marks, notes."""
        ...

    def numel(self, nodes: Iterable[int] | None = None) -> int:
        """Parameters, tied ones once."""
        ...
