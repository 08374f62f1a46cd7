"""A weight of a live model by its place: read, written in place, exchanged with another, and told apart."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .coded import is_coded, put
from .record import Place


def live(place: Place) -> Tensor:
    return place[0]._parameters[place[1]].detach()  # type: ignore[union-attr]


def kept_as_it_is(place: Place) -> Tensor:
    """What brings the weight there back to the bit."""
    return place[0]._parameters[place[1]] if is_coded(place) else live(place).to("cpu", copy=True)  # type: ignore[return-value]


def write(place: Place, value: Tensor) -> None:
    if is_coded(place):
        put(place, value)
        return
    tensor = live(place)
    with writable(tensor):
        tensor.copy_(value)


def exchange(tensor: Tensor, other: Tensor) -> None:
    with writable(tensor):
        for mine, theirs in zip(tensor.split(2**10), other.split(2**10)) if tensor.dim() else [(tensor, other)]:
            before = mine.clone()
            mine.copy_(theirs)
            theirs.copy_(before)


def checksum(place: Place) -> tuple[torch.dtype, int]:
    """A checksum of the bytes, as cheap as reading them; of a tensor in any layout. Codes are replaced as a whole, so
    nothing is written into them in passing."""
    tensor = live(place)
    if is_coded(place):
        return tensor.dtype, 0
    with torch.no_grad():
        data = tensor.contiguous().view(-1).view(torch.uint8)
        if data.storage_offset() % 8:
            data = data.clone()
        whole = data.numel() // 8 * 8
        return tensor.dtype, int(data[:whole].view(torch.int64).sum()) + int(data[whole:].sum())


@contextmanager
def writable(tensor: Tensor) -> Iterator[None]:
    """In-place, without a gradient; tensors that were made in inference mode can be written in it alone."""
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        yield
