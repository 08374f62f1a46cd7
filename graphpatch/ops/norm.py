"""What `norm.replace` and `norm.post` share: the two kinds of norm, and where their epsilon stands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from .op import Refusal, Target

Kind = Literal["rms", "layer"]

_EPSILONS = ("eps", "variance_epsilon", "epsilon", "layer_norm_eps", "layer_norm_epsilon")
_IN_CONFIG = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "layernorm_epsilon", "norm_eps", "norm_epsilon")
WIDTHS = ("hidden_size", "d_model", "n_embd", "dim", "embed_dim")
"""What configs call the number of features of a model."""


def own_epsilon(attributes: Mapping[str, Any]) -> float | None:
    """A norm module's own epsilon; None where it has none, or has it from the dtype, as nn.RMSNorm may."""
    return next((float(attributes[name]) for name in _EPSILONS if _is_number(attributes.get(name))), None)


def epsilon(given: float | None, config: Mapping[str, Any] | None) -> float:
    """Of a new norm: as given, else as the config around has it, else 1e-6."""
    if given is not None:
        return given
    return next((float(config[name]) for name in _IN_CONFIG if _is_number(config.get(name))), 1e-6) if config else 1e-6


def width(target: Target, say: str) -> int:
    """The number of features that a target puts out: its own where it is a linear or an embedding, else the model's.

    Raises `Refusal` where neither is known; `say` is what to write then."""
    attributes, config = target.signature.attributes, target.config or {}
    for name in ("out_features", "embedding_dim", "output_size"):
        if _is_count(attributes.get(name)):
            return int(attributes[name])  # type: ignore[arg-type]
    for name in WIDTHS:
        if _is_count(config.get(name)):
            return int(config[name])
    raise Refusal(
        f"how many features {target.signature.cls or 'the target'} puts out is said neither by it nor by a config",
        f"say it: {say}",
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
