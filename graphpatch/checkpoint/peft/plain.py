"""An adapter of ours as the LoRA (or DoRA) that PEFT knows: two factors, a scale, a magnitude or a bias."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch.nn.functional import pad

from ...lang.diagnostics import Diagnostic, Error
from ...ops.lora_parts import Spread, spread_of
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
    if one.kind == "attention":
        rank = _attention(one, tensors)
    elif one.op.parts is not None:
        how = spread_of(one.op)
        assert how is not None
        tensors["lora_B"] = spread(tensors["lora_B"], how)
        rank *= len(how.chosen)
    unknown = [name for name in tensors if name not in TAILS[one.kind]]
    if unknown:
        raise inexpressible(one.name, f"`{unknown[0]}` of {one.op.text()} has no name in PEFT's files")
    tails = TAILS[one.kind]
    moved = {tails[name]: tensor for name, tensor in theirs(one, tensors).items()}
    return Plain(one, rank, one.op.scale, moved, "lora_magnitude" in tensors, "lora_B_bias" in tensors)


def _attention(one: Adapted, tensors: dict[str, torch.Tensor]) -> int:
    """PEFT has factors of one rank for all of q, k and v and for the output, always; returns the rank."""
    like = next(iter(tensors.values()))
    width = one.signature.attributes["embed_dim"]
    assert isinstance(width, int)
    inside = [at for at, part in enumerate("qkv") if one.op.parts is None or part in one.op.parts]
    rank = one.op.rank * (1 if one.op.parts is None or not inside else len(inside))
    if one.op.parts is not None and inside:
        how = Spread(1, (width,) * 3, tuple(inside), one.op.rank)
        tensors["in_proj_lora_B"] = spread(tensors["in_proj_lora_B"], how)
    for name, rows in (("in_proj", 3 * width), ("out_proj", width)):
        a, b = (tensors.get(f"{name}_lora_{side}") for side in "AB")
        a = like.new_zeros(rank, width) if a is None else pad(a, (0, 0, 0, rank - a.shape[0]))
        b = like.new_zeros(rows, rank) if b is None else pad(b, (0, rank - b.shape[1]))
        tensors[f"{name}_lora_A"], tensors[f"{name}_lora_B"] = a, b
    return rank


def _refuse(one: Adapted) -> None:
    facts = one.signature.attributes
    separate = one.kind == "attention" and "in_proj_weight" not in one.signature.parameters
    if not TAILS[one.kind] or separate:
        raise inexpressible(one.name, f"PEFT has no LoRA on {one.signature.cls} that this could be")
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
