"""`layers.repeat`: another container in the place, whose layers share or copy the parameters of the old ones."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from ..ops.layers_repeat import LayersRepeat
from ..ops.op import Op, Refusal
from .layer_lists import of_layers, places, refuse_computed
from .rewrite import Replacement


class LayersRepeated(Replacement):
    """Layers of their own each, since each has a place of its own; only tensors are shared."""

    @staticmethod
    def build(op: Op, cls: Any, module: nn.Module, device: torch.device) -> nn.Module:
        repeat, held = cast(LayersRepeat, op), list(module._modules.values())
        wrong = [index for index in repeat.sources if index >= len(held)]
        if wrong:
            raise Refusal(f"there is no layer {wrong[0]}: the container has {len(held)}", code="GP581")
        if repeat.sources == tuple(range(len(held))):
            raise Refusal("these are the layers as they are", code="GP581")
        if any("_graphpatch" in part.__dict__ for part in module.modules()):
            raise Refusal(
                "a layer was patched before, and what undoes that knows nothing of copies",
                "revert that patch, repeat the layers, and apply it again",
                code="GP581",
            )
        made, used = copy.copy(module), set[int]()
        made.__dict__["_modules"] = {}
        for place, index in enumerate(repeat.sources):
            layer = cast(nn.Module, held[index])
            made._modules[str(place)] = _again(layer, index, place, repeat.share or index not in used)
            used.add(index)
        return made

    @staticmethod
    def config_values(op: Op, module: nn.Module, config: Any) -> Mapping[str, Any]:
        number, sources = len(module._modules), cast(LayersRepeat, op).sources
        refuse_computed(config, number, sources, "GP581")
        return of_layers(config, number, sources)


def _again(layer: nn.Module, index: int, place: int, share: bool) -> nn.Module:
    """The layer once more, at another place, with its own tensors or copies of them."""
    kept: dict[int, Any] = {}
    for part in layer.modules():
        config = part.__dict__.get("config")
        kept[id(config)] = config
    if share:
        kept.update((id(tensor), tensor) for tensor in (*layer.parameters(), *layer.buffers()))
    made = copy.deepcopy(layer, kept)
    for part, name in list(places(made, index)):
        part.__dict__[name] = place
    return made
