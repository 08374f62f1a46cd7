"""Which factors of an adapter have an effect: their path is a module of the model, both are there, the shapes fit.

Stricter than any reader: most go by the last name of a path alone, and load what then does nothing.
"""

from __future__ import annotations

from contextlib import suppress
from typing import NamedTuple

from ...lang.diagnostics import did_you_mean
from ...ops.lora_shapes import factor_shapes
from ...ops.op import Refusal
from ...tree.tree import Signature, Tree
from .adapter import Adapter, Factors, bare
from .experts import Expert, expert, stack_of, stacks

Shape = tuple[int, ...]
Pair = tuple[Shape, Shape]
_HINTS = 4


class Reached(NamedTuple):
    """What becomes of one pair of factors."""

    path: str
    node: int | None
    """The module of the model, None where there is no such module."""
    why: str
    """Why the factors have no effect; empty where they have."""


def reach(adapter: Adapter, tree: Tree) -> list[Reached]:
    """A verdict on every pair of factors, in the order of their names."""
    found = [_reached(adapter, tree, one) for one in adapter.factors.values()]
    # What is near is told of the first alone: to look for it takes as long as all the rest.
    astray = [at for at, one in enumerate(found) if one.node is None][:_HINTS]
    for at in astray:
        near = _near(tree, _path(adapter, tree, adapter.factors[found[at].path]))
        found[at] = found[at]._replace(why=found[at].why + near)
    return found


def _reached(adapter: Adapter, tree: Tree, one: Factors) -> Reached:
    path = _path(adapter, tree, one)
    if adapter.layout == "mlx" and ".switch_mlp." in path:
        return _switched(tree, one)
    node = tree.find(path)
    single = expert(path)
    if node is None and single is not None:
        node = stack_of(tree, single)
    if node is None:
        return Reached(one.path, None, "no module of the model has this path")
    if one.a is None or one.b is None:
        return Reached(one.path, node, f"lora_{'A' if one.a is None else 'B'} is missing")
    signature, held = tree.signature(node), stacks(tree, node)
    if held and single is not None:
        shapes = _of_expert(held, single, one.rank or 0)
    elif held and "weight" not in signature.parameters:
        shapes = _of_stack(held, one)
    else:
        shapes = _of_module(signature, one)
    has = tuple(one.a.shape), tuple(one.b.shape)
    if has in shapes:
        return Reached(one.path, node, "")
    if not shapes:
        return Reached(one.path, node, f"{signature.cls or 'the module'} there holds nothing that such factors are for")
    wanted = " or ".join(f"{list(a)} and {list(b)}" for a, b in sorted(shapes)[:2])
    return Reached(one.path, node, f"the factors are {list(has[0])} and {list(has[1])}, and the model wants {wanted}")


def _switched(tree: Tree, one: Factors) -> Reached:
    """mlx-lm's name for a stack of experts, with lora_a (experts, rank, in) and lora_b (experts, out, rank)."""
    block, _, name = one.path.rpartition(".")
    single = Expert(block.removesuffix(".switch_mlp"), 0, name)
    node = stack_of(tree, single)
    if node is None or one.a is None or one.b is None or len(one.a.shape) != 3:
        return Reached(
            one.path, node, "no stack of experts of the model is meant" if node is None else "it is no stack"
        )
    held = stacks(tree, node)
    experts = {shape[0] for shape in held.values()}
    fits = (one.a.shape[1:], one.b.shape[1:]) in _of_expert(held, single, one.a.shape[1])
    return Reached(one.path, node, "" if fits and {one.a.shape[0]} == experts else "the model wants other shapes")


def _path(adapter: Adapter, tree: Tree, one: Factors) -> str:
    """As the model has it: diffusers' pipelines name their part first, and its models do not."""
    if adapter.layout == "diffusers":
        return one.path if tree.find(one.path) is not None else one.path.partition(".")[2]
    return bare(one.path)


def _near(tree: Tree, path: str) -> str:
    """A longer or shorter prefix is what goes wrong most: the same tail, elsewhere."""
    parts = path.split(".")
    ends = {p for p in tree.paths if p.endswith("." + path)} or {
        p for at in range(1, len(parts)) if tree.find(p := ".".join(parts[at:])) is not None
    }
    found = f"; did you mean `{min(ends, key=len)}`?" if ends else ""
    if not found and len(tree) < 5000:
        hint = did_you_mean(path, tree.paths)
        found = f"; {hint}" if hint else ""
    return found


# ── the shapes that would fit, A and B ──


def _of_module(signature: Signature, one: Factors) -> set[Pair]:
    rank, weight = one.rank or 0, signature.parameters.get("weight")
    shape = tuple(weight.shape) if weight is not None else ()
    found: set[Pair] = set()
    if "in_proj_weight" in signature.parameters:
        out, in_ = signature.parameters["in_proj_weight"].shape
        return {((rank, in_), (out, rank))}
    if len(shape) == 2 and one.embedding:
        return {((rank, shape[0]), (shape[1], rank))}
    if signature.mro and not one.embedding and rank:
        with suppress(Refusal):
            found.add(factor_shapes(signature, rank))
    if len(shape) > 2:  # PEFT's A has no groups, and ours has
        groups = signature.attributes.get("groups")
        in_ = shape[1] * groups if isinstance(groups, int) else shape[1]
        found.add(((rank, in_, *shape[2:]), (shape[0], rank, *(1 for _ in shape[2:]))))
    elif len(shape) == 2 and not found:  # without classes, a Conv1D of Transformers looks like a linear
        found = {((rank, i), (o, rank)) for o, i in (shape, shape[::-1])}
    return found


def _of_stack(held: dict[str, Shape], one: Factors) -> set[Pair]:
    """PEFT's: A is (experts x rank, in) and B (out, experts x rank), of any of the parameters."""
    rank = one.rank or 0
    return {
        ((rank, i), (o, rank))
        for experts, *sides in held.values()
        if rank % experts == 0
        for o, i in (sides, sides[::-1])
    }


def _of_expert(held: dict[str, Shape], single: Expert, rank: int) -> set[Pair]:
    """Of one expert: `gate_up_proj` holds two projections, and which side of a stack is `in` differs by model."""
    found: set[Pair] = set()
    for name, (experts, *sides) in held.items():
        if single.number >= experts or (single.role == "down") != ("down" in name):
            continue
        halves = 2 if "gate_up" in name else 1
        found |= {((rank, i), (o // halves, rank)) for o, i in (sides, sides[::-1]) if o % halves == 0}
    return found
