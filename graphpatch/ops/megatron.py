"""What megatron-core's config may ask for that would combine wrongly with a rule."""

from __future__ import annotations

from .op import Refusal, Target


def refuse_other_scaling(target: Target) -> None:
    """Raise `Refusal` (GP951) where the config scales embeddings, scores or logits itself (mu-P), or shards weights
    further than tensor parallelism does."""
    config = target.config or {}
    if config.get("use_mup") is True:
        raise Refusal(
            "the config has use_mup, which scales embeddings, attention and logits itself, behind what rules do",
            "build the model without use_mup",
            code="GP951",
        )
    further = next((n for n, v in config.items() if n.startswith("gtp_") and isinstance(v, int) and v > 1), None)
    if further is not None:
        raise Refusal(f"the config shards weights further ({further} > 1), which is untested", code="GP951")
