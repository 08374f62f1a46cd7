"""A module's `config` as plain JSON data, whatever it is: a mapping, a dataclass, a Hugging Face config."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from enum import Enum
from typing import Any

_DEEPEST = 32
_ABSENT = object()


def plain_config(config: Any) -> dict[str, Any] | None:
    """The config as a dict of JSON values, what is none (functions, tensors) left out; None where it is no config.

    Asking a config for its own dict runs its code, so whatever that raises means: not a config.
    """
    try:
        entries = _entries(config)
        if entries is None:
            return None
        plain = _plain(entries, 0)
    except Exception:
        return None
    return plain if isinstance(plain, dict) else None


def _entries(config: Any) -> Mapping[Any, Any] | None:
    if isinstance(config, Mapping):
        return config
    if callable(getattr(config, "to_dict", None)):
        entries = config.to_dict()
        return entries if isinstance(entries, Mapping) else None
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        # Not `asdict`: it would deep-copy whatever the config holds.
        return {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if hasattr(config, f.name)}
    return None


def _plain(value: Any, depth: int) -> Any:
    if value is None or type(value) in (bool, int, str):
        return value
    if depth > _DEEPEST:
        return _ABSENT
    if isinstance(value, Enum):
        return _plain(value.value, depth + 1) if isinstance(value.value, (bool, int, float, str)) else value.name
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    for plain in (bool, int, str):
        if isinstance(value, plain):
            return plain(value)
    if type(value).__module__ == "torch" and type(value).__name__ == "dtype":
        return str(value).removeprefix("torch.")
    if isinstance(value, Mapping):
        items = (
            (str(_plain(k, depth + 1) if not isinstance(k, str) else k), _plain(v, depth + 1)) for k, v in value.items()
        )
        return {k: v for k, v in items if v is not _ABSENT}
    if isinstance(value, (list, tuple)):
        return [v for v in (_plain(item, depth + 1) for item in value) if v is not _ABSENT]
    if isinstance(value, (set, frozenset)):
        return sorted((v for v in (_plain(item, depth + 1) for item in value) if v is not _ABSENT), key=repr)
    if callable(value) or hasattr(value, "shape"):
        return _ABSENT
    entries = _entries(value)
    return _ABSENT if entries is None else _plain(entries, depth + 1)
