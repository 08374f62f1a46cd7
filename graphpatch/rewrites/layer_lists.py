"""What a config says of each layer, for a model of other layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def of_layers(config: Any, number: int, sources: Sequence[int]) -> Mapping[str, Any]:
    """`num_hidden_layers`, and the lists with an entry a layer, of a model whose layers are these of the `number` that
    the config speaks of; nothing where it speaks of another number."""
    if config is None or getattr(config, "num_hidden_layers", None) != number:
        return {}
    lists = {n: v for n, v in vars(config).items() if isinstance(v, (list, tuple)) and len(v) == number}
    chosen = {n: type(v)(v[i] for i in sources) for n, v in lists.items() if "layer" in n}
    return {"num_hidden_layers": len(sources), **chosen}
