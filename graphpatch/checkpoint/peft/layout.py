"""How the same factors lie in PEFT's file and here: equal for linears, embeddings and plain convolutions.

- A convolution with groups: A here has the groups of the base, and one of PEFT sees all channels, so it is filled up
  with zeros, and back.
- One adapter for a tied embedding and head: here as the embedding has it, and PEFT's head has it turned round.
- `nn.MultiheadAttention`: PEFT 0.21 adds the product for the output projection to the weight twice (lora/layer.py,
  `MultiheadAttention.merge` and the `Linear.merge` it calls), in training too, so its B is half of what it comes to.
- DoRA on a convolution: a magnitude (out,) here, (1, out, 1, ...) there.
- Experts: here (experts, rank, in) and (experts, out, rank); PEFT has A as (experts * rank, in), the expert slowest,
  and B as (out, rank * experts), the expert fastest (peft 0.21, lora/layer.py, `ParamWrapper.get_delta_weight`). A
  stack that is stored (experts, in, out) without saying so (Llama 4) PEFT takes for the other way round: its A is our
  B, and its B our A.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ...lang.diagnostics import Diagnostic, Error
from ...ops.lora_experts import stacks_of
from .keys import Adapted

Named = dict[str, torch.Tensor]
_OUTPUT = "out_proj_lora_B"


def ours(one: Adapted, theirs: Mapping[str, torch.Tensor]) -> Named:
    """PEFT's tensors of one target in our layout, by the names of what the op adds."""
    if one.turned:
        return {"lora_A": theirs["lora_B"].t(), "lora_B": theirs["lora_A"].t()}
    found = dict(theirs)
    if _mistaken(one):
        found = {"lora_A": _unstacked(theirs["lora_B"], _flipped(one.shapes["lora_A"]), "lora_B").mT,
                 "lora_B": _unstacked(theirs["lora_A"], _flipped(one.shapes["lora_B"]), "lora_A").mT}  # fmt: skip
    elif one.kind == "experts":
        for name, tensor in theirs.items():
            if len(one.shapes[name]) == 3 and tensor.dim() == 2:
                found[name] = _unstacked(tensor, one.shapes[name], name)
    elif _groups(one) > 1 and "lora_A" in found:
        found["lora_A"] = _collapsed(one, found["lora_A"])
    if one.kind == "convolution" and "lora_magnitude" in found:
        found["lora_magnitude"] = found["lora_magnitude"].flatten()
    if _OUTPUT in found:
        found[_OUTPUT] = found[_OUTPUT] * 2
    return found


def theirs(one: Adapted, ours: Mapping[str, torch.Tensor]) -> Named:
    """The inverse of `ours`."""
    if one.turned:
        return {"lora_A": ours["lora_B"].t(), "lora_B": ours["lora_A"].t()}
    found = dict(ours)
    if _mistaken(one):
        found = {"lora_A": ours["lora_B"].mT.flatten(0, 1), "lora_B": ours["lora_A"].permute(2, 1, 0).flatten(1)}
    elif one.kind == "experts":
        for name, tensor in ours.items():
            if tensor.dim() == 3:
                found[name] = tensor.flatten(0, 1) if name == "lora_A" else tensor.permute(1, 2, 0).flatten(1)
    elif _groups(one) > 1 and "lora_A" in found:
        found["lora_A"] = _expanded(found["lora_A"], _groups(one))
    if one.kind == "convolution" and "lora_magnitude" in found:
        found["lora_magnitude"] = found["lora_magnitude"].view(1, -1, *(1 for _ in ours["lora_A"].shape[2:]))
    if _OUTPUT in found:
        found[_OUTPUT] = found[_OUTPUT] / 2
    return found


def _mistaken(one: Adapted) -> bool:
    """Whether PEFT takes the rows of these experts for their columns."""
    said = one.signature.attributes.get("is_transposed") is True
    return one.kind == "experts" and stacks_of(one.signature)[1] and not said


def _flipped(shape: tuple[int, ...]) -> tuple[int, ...]:
    experts, first, second = shape
    return (experts, second, first)


def _unstacked(tensor: torch.Tensor, shape: tuple[int, ...], name: str) -> torch.Tensor:
    if tensor.numel() != shape[0] * shape[1] * shape[2]:
        return tensor  # of another size, which is told of elsewhere
    if name == "lora_A":
        return tensor.reshape(shape)
    experts, out, rank = shape
    return tensor.reshape(out, rank, experts).permute(2, 0, 1)


def _groups(one: Adapted) -> int:
    groups = one.signature.attributes.get("groups") if one.kind == "convolution" else 1
    return groups if isinstance(groups, int) else 1


def _expanded(a: torch.Tensor, groups: int) -> torch.Tensor:
    """(rank, in / groups, ...) to (rank, in, ...): each group's rows see that group's channels."""
    rank, width = a.shape[0] // groups, a.shape[1]
    wide = a.new_zeros(a.shape[0], width * groups, *a.shape[2:])
    for group in range(groups):
        rows = slice(group * rank, (group + 1) * rank)
        wide[rows, group * width : (group + 1) * width] = a[rows]
    return wide


def _collapsed(one: Adapted, wide: torch.Tensor) -> torch.Tensor:
    groups, shape = _groups(one), one.shapes["lora_A"]
    if tuple(wide.shape) != (shape[0], shape[1] * groups, *shape[2:]):
        return wide  # of another shape, which is told of elsewhere
    rank, width = shape[0] // groups, shape[1]
    a = torch.cat([wide[g * rank : (g + 1) * rank, g * width : (g + 1) * width] for g in range(groups)])
    if not torch.equal(_expanded(a, groups), wide):
        raise Error(
            Diagnostic(
                "GP624",
                f"`{one.name}` has {groups} groups, and its adapter mixes them",
                text=("PEFT's A sees the channels of all groups, which no update of this weight can",),
            )
        )
    return a
