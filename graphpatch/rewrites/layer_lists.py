"""What a config says of each layer, for a model of other layers, and what in a layer knows its place."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from ..ops.op import Refusal

PLACES = ("layer_idx", "layer_id")
"""What modules of Transformers call the place of their layer."""


def places(layer: nn.Module, index: int) -> Iterator[tuple[nn.Module, str]]:
    """The modules in a layer that know it is the one of this number, each with the name of the attribute."""
    for part in layer.modules():
        for name in PLACES:
            if type(part.__dict__.get(name)) is int and part.__dict__[name] == index:
                yield part, name


def refuse_computed(config: Any, number: int, sources: Sequence[int], code: str) -> None:
    """Raise `Refusal` where the config computes a list of the layers, which would be that of others."""
    values = of_layers(config, number, sources)
    if not values:
        return
    changed = copy.copy(config)
    for name, value in values.items():
        setattr(changed, name, value)
    computed = [n for cls in type(config).__mro__ for n, p in vars(cls).items() if isinstance(p, property)]
    for name in dict.fromkeys(n for n in computed if "layer" in n):
        was, now = getattr(config, name, None), getattr(changed, name, None)
        if isinstance(was, list) and len(was) == number and now != [was[i] for i in sources]:
            raise Refusal(
                f"{type(config).__name__} computes `{name}` from the number of layers, and it would be that of others",
                "choose layers whose kinds come in the order that it computes",
                code=code,
            )


def of_layers(config: Any, number: int, sources: Sequence[int]) -> Mapping[str, Any]:
    """`num_hidden_layers`, and the lists with an entry a layer, of a model whose layers are these of the `number` that
    the config speaks of; nothing where it speaks of another number."""
    if config is None or getattr(config, "num_hidden_layers", None) != number:
        return {}
    lists = {n: v for n, v in vars(config).items() if isinstance(v, (list, tuple)) and len(v) == number}
    chosen = {n: type(v)(v[i] for i in sources) for n, v in lists.items() if "layer" in n}
    return {"num_hidden_layers": len(sources), **chosen}
