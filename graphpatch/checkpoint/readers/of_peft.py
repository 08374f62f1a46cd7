"""The updates of an adapter in PEFT's format, so that it can be written anew for a reader that would misread it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from ...tree.tree import Tree
from . import of_config, of_tensors
from .adapter import WEIGHTS, Adapter, bare
from .case import Case
from .deltas import Delta, refuse, refusers, scaled
from .effective import Reached
from .experts import expert, stacks

_KNOWN_INITS = ("gaussian", "eva", "orthogonal", "mica")
"""Those that leave the base weights as they are."""


def deltas_of_peft(adapter: Adapter, tree: Tree) -> list[Delta]:
    """Raises `Error` (GP635) where something of it has no effect on this base, or is no product of two factors."""
    from safetensors.torch import load_file

    case = Case(adapter, tree)
    wrong = list(_in_the_way(case))
    if wrong:
        refuse(wrong)
    tensors = load_file(Path(adapter.folder) / WEIGHTS["peft"])
    return [_delta(adapter, tree, one, tensors) for one in case.reached]


def _in_the_way(case: Case) -> Iterator[str]:
    adapter = case.adapter
    yield from (f"{one.path}: {one.why}" for one in case.reached if one.why)
    yield from (f"{what}; {refusers('dora')} DoRA" for what in of_tensors.has_dora(case))
    yield from (f"{what}; {refusers('bias')} biases" for what in of_tensors.has_bias(case))
    yield from (f"{what}; {refusers('tokens')} single rows" for what in of_tensors.has_token_deltas(case))
    yield from (f"modules_to_save: {name}" for name in adapter.words("modules_to_save"))
    yield from (f"{what}: the base was changed too" for what in of_config.init_outside(*_KNOWN_INITS)(case))
    yield from of_config.switched_on("alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora")(case)
    for key in adapter.others:
        if not key.endswith((".base_layer.weight", ".bias")) and "lora_magnitude" not in key:
            yield f"{key} is no factor"
    for one in case.reached:
        if not one.why and adapter.scale(one.path) is None:
            yield f"{one.path}: the config does not say its scale"


def _delta(adapter: Adapter, tree: Tree, one: Reached, tensors: dict[str, Tensor]) -> Delta:
    factors, scale = adapter.factors[one.path], adapter.scale(one.path)
    assert one.node is not None and scale is not None
    own = {("A" if "_A" in key.rpartition("lora")[2] else "B"): tensors[key] for key in factors.keys}
    a, b = own["A"], own["B"]
    held = stacks(tree, one.node)
    if not held or expert(one.path) is not None or "weight" in tree.signature(one.node).parameters:
        return Delta(one.path, a, scaled(b, scale), factors.embedding)
    name = _parameter(one.path, held, a, b)
    experts = held[name][0]
    # In A an expert's rows are together, in B the columns of all experts alternate.
    a = a.reshape(experts, -1, a.shape[1])
    b = b.reshape(b.shape[0], -1, experts).permute(2, 0, 1)
    return Delta(bare(one.path), a, scaled(b, scale), parameter=name)


def _parameter(path: str, held: dict[str, tuple[int, ...]], a: Tensor, b: Tensor) -> str:
    """Which stack the factors are of: the key does not say, the shapes mostly do; else the inner is the first."""
    sides = {a.shape[1], b.shape[0]}
    fitting = [name for name, (_, *shape) in held.items() if set(shape) == sides]
    return fitting[0 if path != bare(path) else -1]
