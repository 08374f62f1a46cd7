"""LoRA on `nn.Conv1d`, `nn.Conv2d` and `nn.Conv3d`: a convolution to rank channels, and from there one of size 1."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import conv1d, conv2d, conv3d, dropout

from .lora_base import Adapter, LoraModule

_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {3: conv1d, 4: conv2d, 5: conv3d}
"""By the dimensions of a weight."""


class LoraConvolution(LoraModule):
    """A convolves as the base does, with its stride, padding (mode), dilation and groups; B mixes the channels."""

    groups: int
    _conv_forward: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    """The base's own: pads as `padding_mode` says, and convolves the input with any weight."""

    def _update(self, adapter: Adapter, input: Tensor) -> Tensor:
        a, b = getattr(self, adapter.a), getattr(self, adapter.b)
        z = dropout(input, adapter.dropout) if adapter.dropout and self.training else input
        h = self._conv_forward(z, a.to(z.dtype), None)
        h = h if adapter.scale == 1.0 else h * adapter.scale
        return _CONVOLUTIONS[b.dim()](h, b.to(h.dtype), groups=self.groups)
