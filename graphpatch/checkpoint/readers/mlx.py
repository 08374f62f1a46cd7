"""An adapter as mlx-lm reads it: `adapters.safetensors` with transposed factors, and a config of its own.

`lora_a` is (in, rank), `lora_b` (rank, out), and one rank, scale and dropout holds for all (mlx-lm 0.32.2,
tuner/utils.py and tuner/lora.py). `keys` are whole paths: mlx-lm looks for them in a block and in the model, and so
finds exactly these, whichever layers they are in. Stacks of experts, `switch_mlp`, have lora_a (experts, rank, in) and
lora_b (experts, out, rank).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...tree.tree import Tree
from .adapter import PREFIX
from .experts import Expert, expert
from .portable import Written

_SWITCHED = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


def for_mlx(portable: Written, tree: Tree) -> Written:
    """The same adapter for mlx-lm. `portable` is in PEFT's format, with scale 1."""
    tensors: dict[str, Tensor] = {}
    singles: dict[str, dict[int, dict[str, Tensor]]] = {}
    for key, tensor in portable.tensors.items():
        path, name = _taken_apart(key)
        one = expert(path)
        if one is None:
            tensors[f"{path}.{name}"] = tensor.t().contiguous()
        else:
            singles.setdefault(_stacked(one), {}).setdefault(one.number, {})[name] = tensor
    for path, numbers in singles.items():
        for name in ("lora_a", "lora_b"):
            tensors[f"{path}.{name}"] = torch.stack([numbers[number][name] for number in sorted(numbers)])
    paths = sorted({key.rpartition(".")[0] for key in tensors})
    return Written(_config(portable.config, paths, tree), dict(sorted(tensors.items())))


def _config(config: Mapping[str, Any], keys: list[str], tree: Tree) -> dict[str, Any]:
    layers = (tree.config_of(0) or {}).get("num_hidden_layers")
    return {
        "fine_tune_type": "lora",
        "lora_parameters": {"dropout": 0.0, "keys": keys, "rank": config["r"], "scale": 1.0},
        "model": config["base_model_name_or_path"],
        "num_layers": layers if isinstance(layers, int) else -1,
    }


def _taken_apart(key: str) -> tuple[str, str]:
    """The path of the module and `lora_a` or `lora_b`."""
    path, _, tail = key.removeprefix(PREFIX).rpartition(".lora_")
    return path, "lora_a" if "A" in tail else "lora_b"


def _stacked(one: Expert) -> str:
    return f"{one.block}.switch_mlp.{_SWITCHED[one.role] if one.role else one.name}"
