"""The tree of the whole model as one process would have it: what the adapter's files are written about, whatever the
ranks they come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from ..tree.tree import Signature, Tree, content_of
from .experts import experts_of
from .sharding import share_of, size_of

_TOTALS = {
    "num_attention_heads_per_partition": "num_attention_heads",
    "num_query_groups_per_partition": "num_query_groups",
    "num_local_experts": "num_moe_experts",
    "num_gemms": "num_moe_experts",
    "num_layers_per_pipeline_rank": "num_layers",
}
"""Attributes of which the config says how many there are in all."""
_ALONE: Mapping[str, Any] = {"world_size": 1, "tp_size": 1, "vp_stage": None, "vp_size": None, "vocab_start_index": 0}
"""What others are on one process."""


def unsharded(tree: Tree) -> Tree:
    """The same modules, each with the shapes and numbers that it has where one process holds all of it. `tree` has the
    live modules."""
    assert tree.modules is not None
    signatures: list[Signature] = []
    known: dict[tuple[object, ...], int] = {}
    signature_of: list[int] = []
    for node, module in enumerate(tree.modules):
        own = _whole(tree.signature(node), module, tree.config_of(node) or {}, tree.names[node])
        at = known.setdefault(content_of(own), len(signatures))
        if at == len(signatures):
            signatures.append(own)
        signature_of.append(at)
    return replace(tree, signatures=signatures, signature_of=signature_of, modules=None)


def _whole(own: Signature, module: nn.Module, config: Mapping[str, Any], name: str) -> Signature:
    tensors, attributes = dict(own.parameters), dict(own.attributes)
    times = int(config.get("tensor_model_parallel_size") or 1)
    for key, tensor in own.parameters.items():
        if name == "output_layer" and getattr(module._parameters.get(key), "shared_embedding", False):
            # The last stage's copy of what the first has: one process has no other.
            del tensors[key]
            continue
        share = share_of(module, key)
        if share is None:
            continue
        times = size_of(module)
        tensors[key] = tensor._replace(shape=share.shape)
        if key in ("weight", "weight0"):  # of Transformer Engine, whose linears say what a rank has
            for features, part, whole in zip(("out_features", "in_features"), tensor.shape, share.shape):
                if attributes.get(features) == part:
                    attributes[features] = whole
    for key, value in attributes.items():
        if key in _ALONE:
            attributes[key] = _ALONE[key]
        elif key in _TOTALS:
            attributes[key] = config.get(_TOTALS[key], value)
        elif key == "vocab_end_index":
            attributes[key] = attributes.get("num_embeddings", value)
        elif key.endswith("_per_partition") and isinstance(value, int):
            attributes[key] = value * times
    experts = experts_of(module)
    if experts is not None and "weight0" in tensors:
        tensors = _of_all(tensors, experts.here, experts.here * experts.group.size())
    return replace(own, parameters=tensors, attributes=attributes)


def _of_all(tensors: Mapping[str, Any], here: int, everywhere: int) -> dict[str, Any]:
    """The parameters of Transformer Engine's grouped linear, one an expert (weight0, weight1 ...), for every expert."""
    numbered = {f"{kind}{at}": kind for kind in ("weight", "bias") for at in range(here)}
    kinds = dict.fromkeys(numbered[key] for key in tensors if key in numbered)
    found = {f"{kind}{at}": tensors[f"{kind}0"] for kind in kinds for at in range(everywhere)}
    return found | {key: tensor for key, tensor in tensors.items() if key not in numbered}
