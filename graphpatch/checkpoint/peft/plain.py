"""An adapter of ours as the LoRA (or DoRA) that PEFT knows: two factors, a scale, a magnitude or a bias."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from ...lang.diagnostics import Diagnostic, Error
from ...ops.lora_parts import spread_of
from ...rewrites.spread import spread
from .keys import TAILS, Adapted
from .layout import theirs


@dataclass
class Plain:
    """One target as PEFT has it."""

    target: Adapted
    rank: int
    scale: float
    tensors: dict[str, torch.Tensor]
    """By what PEFT calls them below the module: `lora_A.weight`."""
    dora: bool = False
    bias: bool = False
    notes: list[str] = field(default_factory=list)

    def alpha(self, use_rslora: bool) -> float:
        """What gives the scale at this rank."""
        alpha = self.target.op.alpha
        same = self.rank == self.target.op.rank and use_rslora == self.target.op.use_rslora
        return float(self.rank if alpha is None else alpha) if same else self._scaled(use_rslora)

    def _scaled(self, use_rslora: bool) -> float:
        alpha = self.scale * (self.rank**0.5 if use_rslora else self.rank)
        return float(round(alpha)) if abs(alpha - round(alpha)) < 1e-9 * max(1.0, abs(alpha)) else alpha


def plain(one: Adapted, added: Mapping[str, torch.Tensor]) -> Plain:
    """`added` are the target's tensors by what the op adds. Raises `Error` (GP625) where PEFT has no such thing."""
    _refuse(one)
    tensors = dict(added)
    a0, b0 = tensors.pop("lora_A_init", None), tensors.pop("lora_B_init", None)
    rank = one.op.rank
    if a0 is not None and b0 is not None:
        # B A - B0 A0, as one product.
        tensors["lora_A"] = torch.cat([tensors["lora_A"], a0.to(tensors["lora_A"])])
        tensors["lora_B"] = torch.cat([tensors["lora_B"], -b0.to(tensors["lora_B"])], dim=1)
        rank *= 2
    parts = spread_of(one.op)
    if parts is not None:
        # Of all parts at once: each part's product in its rows, and zeros between.
        tensors["lora_B"] = spread(tensors["lora_B"], parts)
        rank *= len(parts.chosen)
    unknown = [name for name in tensors if name not in TAILS[one.kind]]
    if unknown:
        raise inexpressible(one.name, f"`{unknown[0]}` of {one.op.text()} has no name in PEFT's files")
    tails = TAILS[one.kind]
    moved = {tails[name]: tensor for name, tensor in theirs(one, tensors).items()}
    return Plain(one, rank, one.op.scale, moved, "lora_magnitude" in tensors, "lora_B_bias" in tensors)


def _refuse(one: Adapted) -> None:
    facts = one.signature.attributes
    if not TAILS[one.kind]:
        raise inexpressible(one.name, f"PEFT has no LoRA on {one.signature.cls} that this could be")
    if one.op.tied:
        raise inexpressible(
            one.name,
            "its adapter is that of another module too, whose weight it has; a reader of PEFT's file would part them",
            "merge it: patch.merge(), or on the files: graphpatch merge BASE ADAPTER OUT",
        )
    if one.kind == "convolution":
        dilation = facts.get("dilation")
        if isinstance(dilation, tuple) and any(step != 1 for step in dilation):
            raise inexpressible(one.name, "PEFT's A is a convolution without dilation, and this one has some")
        if facts.get("padding_mode", "zeros") != "zeros":
            raise inexpressible(one.name, f"PEFT's A pads with zeros, and this pads with {facts['padding_mode']!r}")
        if facts.get("groups", 1) != 1 and getattr(one.op, "dora", False):
            raise inexpressible(one.name, "PEFT has no DoRA on a convolution with groups")


def inexpressible(where: str, why: str, *fixes: str) -> Error:
    return Error(Diagnostic("GP625", f"`{where}` cannot be written for PEFT", text=(why,), fixes=fixes))
