"""`freeze` and `train`: which parameters train afterwards, decided in file order, the last one wins.

The state of 60,000 modules is one byte each, so that `freeze **` is one slice assignment; single parameters that differ
from their module stand in a dictionary.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from ..tree.select import Cover
from ..tree.tree import Parameter, Tensor, Tree
from .reach import Reach

if TYPE_CHECKING:
    from .plan import Step

_FLOATS = {"float64", "float32", "float16", "bfloat16", "complex64", "complex128", "uninitialized"}
"""What has a gradient; the integers of a quantised base have none, and `train **` passes over them."""
LEAVE, FREEZE, TRAIN = 0, 1, 2
"""What is asked of a parameter: nothing (it keeps its flag), not to train, to train."""

Added = Mapping[int, Mapping[str, Tensor]]
"""The parameters that patches add, by node and name."""


@dataclass
class Grads:
    """What the freeze and train rules say of every parameter."""

    own: bytearray
    """Per node: of its own original parameters."""
    added: bytearray
    """Per node: of the parameters that patches added there (born trainable)."""
    each: dict[Parameter, int] = field(default_factory=dict)
    """Of single parameters, original or added; wins over the two above."""

    def of(self, parameter: Parameter, new: bool) -> int:
        return self.each.get(parameter, (self.added if new else self.own)[parameter[0]])


class Scope(NamedTuple):
    """What one `freeze` or `train` acts on: hits less exceptions. `new` stands for `@new`."""

    trainable: bool
    hits: Cover
    new: bool
    excepted: Cover
    except_new: bool


def freeze_scope(tree: Tree, one: Reach) -> Scope:
    """What a freeze or train rule acts on, from what it reached."""
    rule = one.rule
    excepted = rule.excepted_hits
    return Scope(
        trainable=rule.statement.trainable,  # type: ignore[union-attr]
        hits=Cover(tree, one.nodes, one.parameters),
        new=rule.new,
        excepted=Cover(tree, excepted.nodes, excepted.parameters) if excepted else Cover(tree, ()),
        except_new=rule.except_new,
    )


def decide(tree: Tree, scopes: Sequence[Scope], added: Added) -> Grads:
    """Run the rules in order over the tree and what was added to it."""
    grads = Grads(bytearray(len(tree)), bytearray(len(tree)))
    for scope in scopes:
        _act(grads, scope, added)
    _agree_on_ties(tree, scopes, grads)
    return grads


def _act(grads: Grads, scope: Scope, added: Added) -> None:
    value = TRAIN if scope.trainable else FREEZE
    stretches = list(_minus(scope.hits.intervals, scope.excepted.intervals))
    spared = {
        p: grads.of(p, new=_is_new(p, added))
        for p in scope.excepted.parameters
        if _inside(p[0], stretches) or p in scope.hits.parameters
    }
    for parameter in [p for p in grads.each if _inside(p[0], stretches)]:
        if not (scope.except_new and _is_new(parameter, added)):
            del grads.each[parameter]
    for start, end in stretches:
        grads.own[start:end] = bytes((value,)) * (end - start)
        if not scope.except_new:
            grads.added[start:end] = bytes((value,)) * (end - start)
    for parameter in scope.hits.parameters:
        new = _is_new(parameter, added)
        if parameter[0] not in scope.excepted and not (new and scope.except_new):
            grads.each[parameter] = value
    if scope.new and not scope.except_new:
        for node, tensors in added.items():
            if node not in scope.excepted:
                grads.added[node] = value
                for name in tensors:
                    grads.each.pop((node, name), None)
    grads.each.update(spared)


def _agree_on_ties(tree: Tree, scopes: Sequence[Scope], grads: Grads) -> None:
    """A tied parameter is one: any of its places may be matched, any may be excepted, and all get the same answer."""
    places: dict[Parameter, list[Parameter]] = defaultdict(list)
    for alias, first in tree.ties:
        places[first].append(alias)
    for first, aliases in places.items():
        every = [first, *aliases]
        state = LEAVE
        for scope in scopes:
            hit = any(scope.hits.covers(p) for p in every)
            if hit and not any(scope.excepted.covers(p) for p in every):
                state = TRAIN if scope.trainable else FREEZE
        for parameter in every:
            grads.each[parameter] = state


def _is_new(parameter: Parameter, added: Added) -> bool:
    return parameter[1] in added.get(parameter[0], ())


def _inside(node: int, stretches: Sequence[tuple[int, int]]) -> bool:
    at = bisect_left(stretches, (node + 1,)) - 1
    return at >= 0 and node < stretches[at][1]


def _minus(intervals: Iterable[tuple[int, int]], holes: Sequence[tuple[int, int]]) -> Iterable[tuple[int, int]]:
    for start, end in intervals:
        for hole_start, hole_end in holes:
            if hole_end <= start:
                continue
            if hole_start >= end:
                break
            if start < hole_start:
                yield start, hole_start
            start = max(start, hole_end)
        if start < end:
            yield start, end


def added_by(steps: Iterable[Step]) -> dict[int, Mapping[str, Tensor]]:
    """The parameters that the steps add, node by node."""
    added: dict[int, Mapping[str, Tensor]] = {}
    for step in steps:
        new = {name: tensor for name, tensor in step.adds.items() if not tensor.buffer}
        if new:
            for node in step.nodes:
                added[node] = {**added[node], **new} if node in added else new
    return added


def represented_by(steps: Iterable[Step]) -> set[Parameter]:
    """The parameters that the steps keep in another way, and that cannot train from then on."""
    return {(node, name) for step in steps for name in step.represents for node in step.nodes}


def dropped_by(steps: Iterable[Step]) -> set[Parameter]:
    """The parameters that are there no more."""
    return {(node, name) for step in steps for name in step.drops for node in step.nodes}


def count_trainable(tree: Tree, grads: Grads | None, added: Added, still: Collection[Parameter] = ()) -> int:
    """Trainable elements of the patched model, tied parameters once; those that are `still` never train."""
    grads = grads or Grads(bytearray(len(tree)), bytearray(len(tree)))
    aliases = {alias for alias, _ in tree.ties}
    total = 0
    for (signature, state), times in Counter(zip(tree.signature_of, grads.own)).items():
        tensors = tree.signatures[signature].parameters.values()
        total += times * sum(t.numel for t in tensors if _trains(state, t))
    kinds = {id(tensors): tensors for tensors in added.values()}
    for (kind, state), times in Counter((id(tensors), grads.added[node]) for node, tensors in added.items()).items():
        total += times * sum(t.numel for t in kinds[kind].values() if _trains(state, t))
    for parameter, state in grads.each.items():
        node, name = parameter
        new = _is_new(parameter, added)
        tensor = added[node][name] if new else tree.signature(node).parameters.get(name)
        if tensor is not None:
            by_module = (grads.added if new else grads.own)[node]
            total += tensor.numel * (_trains(state, tensor) - _trains(by_module, tensor))
    for node, name in aliases:
        tensor = tree.signature(node).parameters[name]
        total -= tensor.numel * _trains(grads.of((node, name), new=False), tensor)
    for node, name in still:
        tensor = tree.signature(node).parameters[name]
        total -= tensor.numel * _trains(grads.of((node, name), new=False), tensor)
    return total


def elements_in(tree: Tree, scope: Scope, added: Added) -> int:
    """How many elements a single freeze or train rule speaks of, tied parameters once."""
    own = [sum(t.numel for t in signature.parameters.values()) for signature in tree.signatures]
    stretches = list(_minus(scope.hits.intervals, scope.excepted.intervals))
    total = 0
    for start, end in stretches:
        total += sum(own[kind] * times for kind, times in Counter(tree.signature_of[start:end]).items())
    for alias, first in tree.ties:
        if _inside(alias[0], stretches) and (_inside(first[0], stretches) or scope.hits.covers(first)):
            total -= tree.signature(alias[0]).parameters[alias[1]].numel
    for node, name in scope.hits.parameters:
        tensor = tree.signature(node).parameters.get(name) or added.get(node, {}).get(name)
        if tensor is not None and not _inside(node, stretches) and not scope.excepted.covers((node, name)):
            total += tensor.numel
    for node, name in scope.excepted.parameters:
        tensor = tree.signature(node).parameters.get(name)
        if tensor is not None and _inside(node, stretches):
            total -= tensor.numel
    if not scope.except_new:
        for node, tensors in added.items():
            if scope.new or _inside(node, stretches):
                total += sum(t.numel for t in tensors.values())
    return total


def _trains(state: int, tensor: Tensor) -> bool:
    return (state == TRAIN or (state == LEAVE and tensor.trainable)) and tensor.dtype in _FLOATS
