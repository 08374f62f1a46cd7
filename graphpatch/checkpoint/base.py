"""Is a model the base that an adapter was made on?

What must be the same is what the adapter's weights rest on: the modules that hold weights, their paths and classes, the
shapes, the ties. What need not is how the weights are kept: dtype (trained in float32, served in bfloat16) or
quantised, and whatever a version of a library adds or renames beside them.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable
from dataclasses import replace
from hashlib import sha256
from typing import NamedTuple

from ..lang.diagnostics import Diagnostic, Error
from ..tree.compress import compress
from ..tree.diff import describe, diff
from ..tree.tree import Signature, Tree

_SHOWN = 8
log = logging.getLogger("graphpatch")


class _Facts(NamedTuple):
    """Of a module that holds weights."""

    names: frozenset[str]
    """Of its class and those it derives from."""
    cls: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]

    def fits(self, other: _Facts) -> bool:
        """The same, or of a kind: `Linear4bit` is a Linear."""
        return self.shapes == other.shapes and (
            self.cls in other.names or other.cls in self.names or not (self.cls and other.cls)
        )


def weights_hash(tree: Tree) -> str:
    """Over the names and shapes of the weights."""
    facts = _facts(tree)
    lines = (f"{path}.{name} {list(shape)}\n" for path, one in sorted(facts.items()) for name, shape in one.shapes)
    return sha256("".join(lines).encode("utf-8", "surrogatepass")).hexdigest()


def check_base(made_on: Tree, now: Tree, keys: Iterable[str], what: str) -> None:
    """Raise `Error` (GP611) with the difference where `now` is another model than `made_on`.

    `keys` are those of the adapter's tensors. Warns (GP612) of numbers, `num_heads` or `eps`, that are not as they
    were: the weights would fit, and the model might not compute what it did. Other differences go to the log.
    """
    if made_on.fingerprint == now.fingerprint:
        return
    before, after = _facts(made_on), _facts(now)
    wrong = [path for path, facts in before.items() if path in after and not facts.fits(after[path])]
    if wrong or before.keys() != after.keys() or _ties(made_on) != _ties(now):
        raise _misfit(made_on, now, set(wrong), after.keys(), list(keys), what)
    numbers = _numbers(made_on, now)
    if numbers:
        found = Diagnostic(
            "GP612",
            f"{what} was trained on a {made_on.title} with other settings than this one's",
            text=tuple(numbers[:_SHOWN]),
            fixes=("the weights fit; what the model computes may not be what it was",),
            severity="warning",
        )
        warnings.warn(found.render(), stacklevel=3)
    if log.isEnabledFor(logging.INFO):
        log.info("%s fits this model, which differs in what does not matter:\n%s", what, diff(made_on, now))


def _facts(tree: Tree) -> dict[str, _Facts]:
    """By path, of the modules that hold weights."""
    known = [_facts_of(signature) for signature in tree.signatures]
    return {path: known[kind] for path, kind in zip(tree.paths, tree.signature_of) if known[kind].shapes}


def _facts_of(signature: Signature) -> _Facts:
    return _Facts(
        frozenset(name.rpartition(".")[2] for name in signature.mro[:-1] or signature.mro),
        signature.cls,
        tuple(sorted((name, weight_shape(signature, name)) for name in signature.parameters)),
    )


def weight_shape(signature: Signature, name: str) -> tuple[int, ...]:
    """A packed weight has the shape that its module says."""
    tensor, said = signature.parameters[name], signature.attributes
    packed = name == "weight" and tensor.dtype in ("uint8", "int8") and {"in_features", "out_features"} <= said.keys()
    return (said["out_features"], said["in_features"]) if packed else tuple(tensor.shape)  # type: ignore[return-value]


def _ties(tree: Tree) -> set[tuple[str, str]]:
    ties = {(tree.paths[a[0]] + "." + a[1], tree.paths[b[0]] + "." + b[1]) for a, b in tree.ties}
    for node, parent, name in tree.edges:
        if tree.numel(range(node, tree.ends[node])):
            ties.add((f"{tree.paths[parent]}.{name}", tree.paths[node]))
    return ties


def _misfit(made_on: Tree, now: Tree, wrong: set[str], there: Iterable[str], keys: list[str], what: str) -> Error:
    paths = {*there, *now.paths}
    nowhere = [key for key in keys if key.rpartition(".")[0] not in paths]
    differ = sum(key.rpartition(".")[0] in wrong for key in keys)
    found = diff(_bare(made_on), _bare(now))
    lines = str(found).splitlines()
    text = (
        f"{what} was made on {made_on.title}, and this is {now.title}; {len(nowhere)} of its {len(keys)} tensors have "
        f"no place here, {differ} of those that have differ in shape or class",
        *lines[:_SHOWN],
        *([f"... and {len(lines) - _SHOWN} more lines"] if len(lines) > _SHOWN else []),
        *([f"first without a place: {nowhere[0]}"] if nowhere else []),
    )
    fixes = (f"base it was made for: {made_on.title}, fingerprint {made_on.fingerprint[:12]}, in {what}/adapter.json",)
    return Error(Diagnostic("GP611", "this adapter does not fit this model", text=text, fixes=fixes))


def _bare(tree: Tree) -> Tree:
    """The tree less what need not be the same, so that a difference shows what must."""
    sizes = ("in_features", "out_features")
    bare = []
    for signature in tree.signatures:
        tensors = {
            name: tensor._replace(shape=weight_shape(signature, name), dtype="")
            for name, tensor in signature.parameters.items()
        }
        said = {k: v for k, v in signature.attributes.items() if k in sizes} if tensors else {}
        bare.append(replace(signature, mro=(signature.cls,) if signature.mro else (), attributes=said, buffers={},
                            parameters=tensors))  # fmt: skip
    return replace(tree, signatures=bare)


def _numbers(made_on: Tree, now: Tree) -> list[str]:
    """Numbers among the attributes that have another value, a line each. Rates of dropout change nothing in the end."""
    nodes = {path: node for node, path in enumerate(now.paths)}
    lines: dict[str, list[int]] = {}
    pairs: dict[tuple[int, int], list[str]] = {}
    for node, path in enumerate(made_on.paths):
        if path in nodes:
            pair = (made_on.signature_of[node], now.signature_of[nodes[path]])
            if pair not in pairs:
                pairs[pair] = list(_changed(made_on.signatures[pair[0]], now.signatures[pair[1]]))
            for line in pairs[pair]:
                lines.setdefault(line, []).append(nodes[path])
    return [f"{', '.join(compress(now, where)[:3])}   {line}" for line, where in lines.items()]


def _changed(before: Signature, after: Signature) -> Iterable[str]:
    if "Dropout" in after.cls:
        return
    for name, value in before.attributes.items():
        other = after.attributes.get(name)
        numbers = type(value) in (int, float) and type(other) in (int, float)
        if numbers and value != other and "drop" not in name.lower():
            yield f"{describe(after)}   {name}: {value!r} -> {other!r}"
