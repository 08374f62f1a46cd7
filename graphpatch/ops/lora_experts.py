"""Stacks of experts that `lora` knows: parameters of three dimensions, one matrix an expert."""

from __future__ import annotations

from typing import NamedTuple

from ..tree.tree import Signature
from .op import Refusal, Target

_GROUPED = "GroupedMLP"
_HERE = "graphpatch.rewrites.lora_experts"
ROUTED, TRANSPOSED = f"{_HERE}:LoraExperts", f"{_HERE}:LoraTransposedExperts"
STACKS = {
    "transformers.models.llama4.modeling_llama4.Llama4TextExperts": f"{_HERE}:LoraSpreadExperts",
    "transformers.models.jetmoe.modeling_jetmoe.JetMoeParallelExperts": f"{_HERE}:LoraParallelExperts",
    "transformers.models.step3p7.modeling_step3p7.Step3p7Experts": ROUTED,
    f"megatron.core.transformer.moe.experts.{_GROUPED}": "graphpatch.megatron.lora_grouped:LoraGroupedMLP",
    "*": ROUTED,
}
"""From the class that owns the stack to the rewrite that knows its forward. `*` are the experts that Transformers
dispatches (`use_experts_implementation`), whatever their class: they say themselves how they are laid out."""

_DISPATCHED = ("has_gate", "has_bias", "is_transposed")
"""What that decorator puts on an instance."""


class Stack(NamedTuple):
    """One linear an expert, as a parameter."""

    experts: int
    in_features: int
    out_features: int
    transposed: bool
    """Stored (experts, in, out), and not as a linear's weight is."""


def stack(target: Target) -> Stack:
    """What a parameter is as experts. Raises `Refusal` where it is none that `lora` knows the use of."""
    signature, name, tensor = target.signature, target.parameter, target.tensor
    projections, transposed = stacks_of(signature)
    if name not in projections or tensor is None:
        has = f"of {signature.cls or 'this module'} `lora` takes {' and '.join(projections)}" if projections else ""
        raise Refusal(
            f"`{name}` is a parameter of {signature.cls or 'a module'}, and `lora` takes modules, and the stacked "
            f"experts of models whose forward it knows" + (f": {has}" if has else ""),
            "end the selector at the module, if that is a Linear, say",
            "experts: those that Transformers dispatches (Mixtral, Qwen-MoE, DeepSeek, gpt-oss ...), and of "
            + ", ".join(sorted(row.rpartition(".")[2] for row in STACKS if row != "*")),
            code="GP456",
        )
    shape = tensor.shape
    if _kind(signature) == _GROUPED:
        shape = _apart(shape, name, signature.attributes.get("num_local_experts"))
    if len(shape) != 3 or 0 in shape or tensor.dtype not in _FLOATS:
        raise Refusal(
            f"`{name}` of {signature.cls} is {tensor.dtype} of shape {list(tensor.shape)}, "
            "and experts are three dimensions of floats",
            code="GP456",
        )
    experts, first, second = shape
    return Stack(experts, first, second, True) if transposed else Stack(experts, second, first, False)


def _apart(shape: tuple[int, ...], name: str, experts: object) -> tuple[int, ...]:
    """(experts, in, out) of a matrix in which megatron-core keeps them one behind the other."""
    if len(shape) != 2 or not isinstance(experts, int) or experts < 1:
        return shape
    rows, columns = shape
    return (experts, rows, columns // experts) if name == "weight1" else (experts, rows // experts, columns)


def row_of(target: Target, row: str) -> str:
    """The rewrite that knows how the stack is stored: a merge has to, and sees no module."""
    return TRANSPOSED if row == ROUTED and stacks_of(target.signature)[1] else row


_FLOATS = {"float64", "float32", "bfloat16", "float16"}


def _kind(signature: Signature) -> str:
    return next((c.rpartition(".")[2] for c in signature.mro if c in STACKS), "")


def stacks_of(signature: Signature) -> tuple[tuple[str, ...], bool]:
    """The stacks of a module, and whether they are transposed; none where its forward is unknown."""
    kind = _kind(signature)
    if kind == _GROUPED:
        return ("weight1", "weight2"), True
    if kind == "JetMoeParallelExperts":
        return ("weight",), False
    if kind == "Llama4TextExperts":
        return ("gate_up_proj", "down_proj"), True
    facts = signature.attributes
    if kind == "Step3p7Experts" or all(isinstance(facts.get(name), bool) for name in _DISPATCHED):
        up = "gate_up_proj" if facts.get("has_gate", True) else "up_proj"
        return (up, "down_proj"), bool(facts.get("is_transposed", False))
    return (), False
