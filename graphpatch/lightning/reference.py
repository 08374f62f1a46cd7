"""How a checkpoint refers to the base that it leaves out: by path, names and shapes, and a sample of the values."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from os import PathLike, fspath
from typing import Any, NamedTuple

import torch
from torch import nn

from ..lang.diagnostics import refusal

_SAMPLED = 32
"""Values of a tensor that are looked at. All of them would be read from the device at every start."""


class Weight(NamedTuple):
    """What is noted of a weight."""

    shape: tuple[int, ...]
    sample: str
    """A hash of some of its values; empty where a process has none or a part of them."""


def weights_of(module: nn.Module) -> dict[str, Weight]:
    """Of every weight of a module as it is now, the transform behind it."""
    return {name: Weight(tuple(p.shape), _sample(p)) for name, p in module.named_parameters(remove_duplicate=False)}


def _sample(parameter: nn.Parameter) -> str:
    values = parameter.detach()
    # A subclass (sharded, quantised) means something else by an index.
    if type(values) is not torch.Tensor or values.is_meta or not values.numel():
        return ""
    some = values.flatten()[:: max(1, values.numel() // _SAMPLED)][:_SAMPLED]
    # Rounded, so that a base that is loaded in half precision is the same one.
    return blake2b(some.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes(), digest_size=8).hexdigest()


def path_of(module: nn.Module, base_checkpoint: Any) -> str | None:
    """Where the base's weights come from, as far as anything says so: `base_checkpoint`, or what `from_pretrained` was
    given."""
    if isinstance(base_checkpoint, (str, PathLike)):
        return fspath(base_checkpoint)
    configs = (getattr(part, "config", None) for part in module.modules())
    return next((name for name in (getattr(c, "_name_or_path", None) for c in configs) if name), None)


def reference(left_out: Mapping[str, Weight], path: str | None) -> dict[str, Any]:
    """What a checkpoint says of the weights that it leaves out, and that came from `path`. Plain data."""
    weights = sorted(left_out.items())
    sampled = [(name, weight.sample) for name, weight in weights if weight.sample]
    return {
        "path": path,
        "tensors": len(weights),
        "shapes": _hash((name, weight.shape) for name, weight in weights),
        "sampled": len(sampled),
        "sample": _hash(sampled),
    }


def _hash(parts: Iterable[Any]) -> str:
    return blake2b(repr(list(parts)).encode(), digest_size=16).hexdigest()


def check_reference(then: Mapping[str, Any] | None, now: Mapping[str, Any]) -> None:
    """Raise `ApplyError` (GP834) where a checkpoint was made on a base of other names or shapes; warn where its values
    are others, as they are where a module that makes its base at random is made a second time."""
    if then is None:
        return
    made_on = f"it was {then['path']}" if then["path"] else "the checkpoint does not know where it came from"
    if (then["tensors"], then["shapes"]) != (now["tensors"], now["shapes"]):
        raise refusal(
            "GP834",
            f"this checkpoint was made on another base: {then['tensors']} weights, and here are {now['tensors']}, or "
            "other names or shapes",
            f"build the base that it was made on; {made_on}",
        )
    # Where another number could be sampled (sharded, quantised), there is nothing to compare.
    if then["sampled"] == now["sampled"] and then["sample"] != now["sample"]:
        warnings.warn(
            f"graphpatch: the base has other values than the one that this checkpoint was made on; {made_on}. "
            "A checkpoint leaves the base out: load it before, by base_checkpoint (base= of load_from_checkpoint) or "
            "in the module itself.",
            stacklevel=2,
        )
