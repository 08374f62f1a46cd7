"""Low-rank updates of parts of a linear, as one of all of it: canonical LoRA of q and v inside a fused q, k, v."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..ops.lora_parts import Spread


def spread(b: Tensor, how: Spread) -> Tensor:
    """B stacked by part, (rows of the parts, rank), as the B (out, parts * rank) of the whole: each part's rows stand
    where the weight has them, and in the columns that are its own; zero elsewhere.

    With the A of all parts stacked, (parts * rank, in), its product is every part's B A in that part's rows.
    """
    count, at, blocks = len(how.chosen), 0, []
    for part, size in enumerate(how.sizes):
        if part not in how.chosen:
            blocks.append(b.new_zeros(how.groups, size, count * how.rank))
            continue
        rows, place = how.groups * size, how.chosen.index(part)
        own = b[at : at + rows].unflatten(0, (how.groups, size))
        blocks.append(pad(own, (place * how.rank, (count - 1 - place) * how.rank)))
        at += rows
    return torch.cat(blocks, 1).flatten(0, 1)


def of_parts(a: Tensor, b: Tensor, how: Spread) -> list[tuple[Tensor, Tensor]]:
    """Each part's own A (rank, in) and B (rows, rank), as views."""
    return list(zip(a.split(how.rank), b.split([how.groups * how.sizes[part] for part in how.chosen])))
