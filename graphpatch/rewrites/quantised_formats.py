"""How numbers become codes of four or eight bits, and numbers again: by rows, along the last dimension of a weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Union

import torch
from torch import Tensor
from torch.nn.functional import embedding

NORMAL_FLOAT = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The sixteen levels of NF4: quantiles of a normal distribution, one of them zero (arXiv:2305.14314, appendix E)."""

Parts = Mapping[str, Tensor]
_AT_ONCE = 2**22
"""Elements that are encoded together: what is made on the way is several times as large as they are."""


class NF4(NamedTuple):
    """The nearest of sixteen levels times the block's largest magnitude: the codes, two a byte, and float32 scales.

    Bit for bit what bitsandbytes keeps with `compress_statistics=False`.
    """

    block: int

    def encode(self, rows: Tensor) -> dict[str, Tensor]:
        blocks = rows.unflatten(-1, (-1, self.block))
        scales = blocks.abs().amax(-1)
        levels = _levels(rows.device)
        # A block of zeros has no scale to divide by; its codes are those of zero.
        relative = blocks / torch.where(scales == 0, 1.0, scales).unsqueeze(-1)
        codes = torch.bucketize(relative, (levels[1:] + levels[:-1]) / 2, out_int32=True)
        return {"codes": _packed(codes.to(torch.uint8).flatten(-2)), "scales": scales}

    def decode(self, parts: Parts) -> Tensor:
        codes, scales = parts["codes"], parts["scales"]
        pairs = torch.cartesian_prod(*[_levels(codes.device)] * 2)  # of each byte
        values = embedding(codes.int(), pairs).flatten(-2)
        return (values.unflatten(-1, (-1, self.block)) * scales.unsqueeze(-1)).flatten(-2)


class Int4(NamedTuple):
    """Sixteen even steps from a group's smallest value to its largest; both float32. As torchao's int4 has it."""

    group: int

    def encode(self, rows: Tensor) -> dict[str, Tensor]:
        groups = rows.unflatten(-1, (-1, self.group))
        least, most = groups.aminmax(dim=-1)
        steps = ((most - least) / 15).clamp(min=torch.finfo(torch.float32).tiny)
        codes = ((groups - least.unsqueeze(-1)) / steps.unsqueeze(-1)).round().clamp(0, 15)
        return {"codes": _packed(codes.to(torch.uint8).flatten(-2)), "steps": steps, "least": least}

    def decode(self, parts: Parts) -> Tensor:
        codes = _unpacked(parts["codes"]).to(torch.float32).unflatten(-1, (-1, self.group))
        return torch.addcmul(parts["least"].unsqueeze(-1), codes, parts["steps"].unsqueeze(-1)).flatten(-2)


class Int8(NamedTuple):
    """256 even steps around zero, a scale for each row. Of a float32 weight, bit for bit torchao's."""

    def encode(self, rows: Tensor) -> dict[str, Tensor]:
        scales = (rows.abs().amax(-1) / 127.5).clamp(min=torch.finfo(torch.float32).eps)
        codes = (rows * (1.0 / scales).unsqueeze(-1)).round().clamp(-128, 127)
        return {"codes": codes.to(torch.int8), "scales": scales}

    def decode(self, parts: Parts) -> Tensor:
        return parts["codes"].to(torch.float32) * parts["scales"].unsqueeze(-1)


Format = Union[NF4, Int4, Int8]


def encode(format: Format, weight: Tensor) -> dict[str, Tensor]:
    """The parts of a weight of two dimensions, computed in float32."""
    with torch.no_grad():
        step = max(1, _AT_ONCE // max(1, weight.shape[1]))
        pieces = [format.encode(rows.to(torch.float32)) for rows in weight.detach().split(step)]
        return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}


def _levels(device: torch.device) -> Tensor:
    return torch.tensor(NORMAL_FLOAT, dtype=torch.float32, device=device)


def _packed(codes: Tensor) -> Tensor:
    """Two a byte, the first in the upper half."""
    return (codes[..., ::2] << 4) | codes[..., 1::2]


def _unpacked(codes: Tensor) -> Tensor:
    return torch.stack((codes >> 4, codes & 15), dim=-1).flatten(-2)
