"""What an expression sees of the module (or parameter) it is about: attributes, captures, the nearest config."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel

from ..lang.diagnostics import Span
from ..lang.evaluate import EvaluationError
from ..lang.syntax import Name, Node, Var
from ..tree.select import Cover, Hits
from ..tree.tree import Parameter, Signature, Tensor, Tree
from .scope import FileScope

Hit = int | Parameter


class Needs(NamedTuple):
    """What the value of some expressions depends on, so that it is worked out once per difference, not per module."""

    attributes: frozenset[str]
    captures: frozenset[str]
    config: bool

    @property
    def constant(self) -> bool:
        return not (self.attributes or self.captures or self.config)


def needs(expressions: Sequence[Node], captures: frozenset[str]) -> Needs:
    attributes: set[str] = set()
    used: set[str] = set()
    for node in _walk(expressions):
        if isinstance(node, Name):
            attributes.add(node.name.partition(".")[0])
        elif isinstance(node, Var) and node.name in captures:
            used.add(node.name)
    return Needs(frozenset(attributes - {"config"}), frozenset(used), "config" in attributes)


def _walk(nodes: Sequence[Any]) -> Iterator[Node]:
    stack: list[Any] = list(nodes)
    while stack:
        node = stack.pop()
        if isinstance(node, tuple) and not isinstance(node, Span):
            stack.extend(node)
        elif isinstance(node, BaseModel):
            yield node  # type: ignore[misc]
            stack.extend(getattr(node, name) for name in type(node).model_fields)


def owner(hit: Hit) -> int:
    """The node of a hit: a parameter's is the module that owns it."""
    return hit if isinstance(hit, int) else hit[0]


def split(hits: Iterable[Hit]) -> tuple[list[int], list[Parameter]]:
    """The modules and the parameters among hits, each in their order."""
    nodes: list[int] = []
    parameters: list[Parameter] = []
    for hit in hits:
        if isinstance(hit, int):
            nodes.append(hit)
        else:
            parameters.append(hit)
    return nodes, parameters


def covered(cover: Cover, hit: Hit) -> bool:
    """Whether a hit, be it module or parameter, is at or below what is covered."""
    return hit in cover if isinstance(hit, int) else cover.covers(hit)


def by_difference(
    tree: Tree, hits: Hits, chosen: Sequence[Hit], what: Needs
) -> Iterator[tuple[TargetFacts, list[Hit]]]:
    """The chosen hits in groups that look the same to an expression with these needs."""
    groups: dict[Hashable, list[Hit]] = {}
    for hit in chosen:
        node = owner(hit)
        key: tuple[Hashable, ...] = (tree.signature_of[node], None if isinstance(hit, int) else hit[1])
        if what.config:
            key += (config_index(tree, node),)
        if what.captures:
            bindings = hits.bindings(hit)
            key += tuple(bindings.get(name) for name in sorted(what.captures))
        groups.setdefault(key, []).append(hit)
    for group in groups.values():
        yield TargetFacts(tree, group[0], hits.bindings(group[0]) if what.captures else {}), group


def config_index(tree: Tree, node: int) -> int:
    while node >= 0:
        config = tree.signatures[tree.signature_of[node]].config
        if config >= 0:
            return config
        node = tree.parents[node]
    return -1


class TargetFacts:
    """One target, for all that look the same."""

    def __init__(self, tree: Tree, hit: Hit, bindings: Mapping[str, int]):
        self.tree, self.node = tree, owner(hit)
        self.parameter = None if isinstance(hit, int) else hit[1]
        self.bindings = bindings

    @property
    def signature(self) -> Signature:
        return self.tree.signature(self.node)

    def attribute(self, name: str) -> tuple[bool, Any]:
        """Whether the target has the attribute, and its value."""
        signature = self.signature
        if self.parameter is not None:
            tensor = signature.parameters.get(self.parameter)
            if tensor is not None and name in TENSOR_FACTS:
                return True, _tensor_fact(tensor, name)
        for table in (signature.attributes, signature.parameters, signature.buffers):
            if name in table:
                return True, table[name]
        return False, None


class TargetScope(FileScope):
    """The names of a file, and beside them the target's own."""

    where_config = "no module around the target"

    def __init__(self, scope: FileScope, facts: TargetFacts, strict: bool):
        super().__init__(scope.world, scope.file)
        self.facts, self.strict = facts, strict
        """`strict`: an absent attribute is an error (in arguments); else it reads none (in `where`)."""

    def var(self, name: str, span: Span | None) -> Any:
        if name in self.facts.bindings:
            return self.facts.bindings[name]
        return super().var(name, span)

    def name(self, dotted: str, span: Span | None) -> Any:
        head, *rest = dotted.split(".")
        if head == "config":
            return self._config(rest, span)
        has, value = self.facts.attribute(head)
        if not has and self.strict:
            known = ", ".join(sorted(self.facts.signature.attributes)) or "none"
            raise EvaluationError(
                f"{self.facts.signature.cls or 'the target'} has no attribute `{head}` (it has {known}): "
                f'quote it if it is text, "{head}", or write ${head} if it is a param',
                span,
            )
        for fact in rest:
            if value is None:
                return None
            if not isinstance(value, Tensor) or fact not in TENSOR_FACTS:
                raise EvaluationError(f"`{dotted}`: only parameters have parts, .shape .ndim .dtype", span)
            value = _tensor_fact(value, fact)
        return value

    def config(self) -> Mapping[str, Any] | None:
        return self.facts.tree.config_of(self.facts.node)


TENSOR_FACTS = ("shape", "ndim", "dtype")
"""What `where` may ask of a parameter."""


def _tensor_fact(tensor: Tensor, fact: str) -> Any:
    return {"shape": list(tensor.shape), "ndim": len(tensor.shape), "dtype": tensor.dtype}[fact]
