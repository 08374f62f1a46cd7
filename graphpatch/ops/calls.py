"""Targets whose forward nobody calls: an op that changes what a module computes would do nothing there."""

from __future__ import annotations

from .op import Refusal, Target

_CONTAINERS = {"ModuleList", "ModuleDict", "ParameterList", "ParameterDict"}


def refuse_uncalled(target: Target, op: str) -> None:
    """Raise `Refusal` where the target is a container, or where its parent reads its weight and never calls it."""
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


def _torch_class(mro: tuple[str, ...], names: set[str]) -> bool:
    return any(c.startswith("torch.nn.") and c.rpartition(".")[2] in names for c in mro)
