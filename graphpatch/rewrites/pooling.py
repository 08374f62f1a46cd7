"""From the states of tokens to one of the sequence, whatever is padding left out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..lang.diagnostics import ApplyError, Diagnostic


def real_tokens(mask: Any, ids: Tensor | None, pad: int | None, length: int) -> Tensor | None:
    """Which tokens are no padding, B x S, as bools; None where nothing says, which means: all.

    By the attention mask (B x S; where a cache is read, B x more, its last ones), else by the id of the padding.
    """
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask[:, -length:] != 0
    if ids is not None and pad is not None:
        return ids != pad
    return None


def last(states: Tensor, real: Tensor | None) -> Tensor:
    """The state at the last real token, B x H of B x S x H; of a row that is all padding, at its first token."""
    if real is None:
        return states[:, -1]
    # As Transformers finds it, whichever side the padding is on.
    numbers = torch.arange(states.shape[1], device=states.device, dtype=torch.int32)
    at = (numbers * real.to(states.device, torch.int32)).argmax(-1)
    return states[torch.arange(states.shape[0], device=states.device), at]


def pooled(states: Tensor, real: Tensor | None, how: str) -> Tensor:
    """B x H of B x S x H: by `last`, `cls` (the first real token), `mean` or `max` over the real ones."""
    if how == "last":
        return last(states, real)
    if real is not None and real.shape != states.shape[:2]:
        raise ApplyError(
            Diagnostic(
                "GP571",
                f"a mask of {tuple(real.shape)} does not say which of {tuple(states.shape[:2])} tokens are padding",
                fixes=("give attention_mask as (batch, length)",),
            )
        )
    if how == "cls":
        if real is None:
            return states[:, 0]
        at = real.to(states.device, torch.int32).argmax(-1)
        return states[torch.arange(states.shape[0], device=states.device), at]
    if how == "mean":
        if real is None:
            return states.mean(1)
        weight = real.to(states.device).unsqueeze(-1).to(states.dtype)
        # As sentence-transformers does, so that a row that is all padding gives zeros.
        return (states * weight).sum(1) / weight.sum(1).clamp(min=1e-9)
    if real is None:
        return states.amax(1)
    return states.masked_fill(~real.to(states.device).unsqueeze(-1), torch.finfo(states.dtype).min).amax(1)
