"""Targets whose forward nobody calls: an op that changes what a module computes would do nothing there."""

from __future__ import annotations

from .op import Refusal, Target

_CONTAINERS = {"ModuleList", "ModuleDict", "ParameterList", "ParameterDict"}


def refuse_uncalled(target: Target, op: str) -> None:
    """Raise `Refusal` where the target is a container, or (GP503) its parent reads its weight and never calls it."""
    cls = target.signature.cls
    if _torch_class(target.signature.mro, _CONTAINERS):
        raise Refusal(
            f"{cls} has no forward of its own, so `{op}` there would do nothing",
            "target the modules inside it: `[*]`",
        )
    if target.parent is not None and _torch_class(target.parent.mro, {"MultiheadAttention"}):
        name = target.path.rpartition(".")[2]
        raise Refusal(
            f"nn.MultiheadAttention reads {name}.weight itself and never calls the module, "
            f"so `{op}` there would do nothing",
            *(["target the attention itself, `:MultiheadAttention`, which has factors for it"] if op == "lora" else []),
            "leave it out: except :MultiheadAttention",
            code="GP503",
        )
    if target.parent is not None and _fuses(target):
        raise Refusal(
            f"{target.parent.cls} computes with the weights of its linears in one kernel, by Transformer Engine's op "
            f"fuser, and never calls them, so `{op}` there would do nothing",
            "build the model without use_te_op_fuser and use_transformer_engine_op_fuser",
            code="GP503",
        )


def _fuses(target: Target) -> bool:
    """Whether the target is in a feed-forward part of megatron-core that does so: always, or where the config says."""
    above = {c.rpartition(".")[2] for c in target.parent.mro if c.startswith("megatron.")} if target.parent else set()
    asked = (target.config or {}).get("use_transformer_engine_op_fuser") is True
    return "TEFusedMLP" in above or (asked and "TEGroupedMLP" in above)


def _torch_class(mro: tuple[str, ...], names: set[str]) -> bool:
    return any(c.startswith("torch.nn.") and c.rpartition(".")[2] in names for c in mro)
