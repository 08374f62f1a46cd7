"""LoRA on `nn.Conv1d`, `nn.Conv2d` and `nn.Conv3d`: a convolution to rank channels, and from there one of size 1."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor
from torch.nn.functional import conv1d, conv2d, conv3d, dropout

from .lora_base import Adapter, LoraModule
from .merging import LowRank, Merging, Product

_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {3: conv1d, 4: conv2d, 5: conv3d}
"""By the dimensions of a weight."""


class LoraConvolution(LoraModule):
    """A convolves as the base does, with its stride, padding (mode), dilation and groups; B mixes the channels."""

    groups: int
    _conv_forward: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    """The base's own: pads as `padding_mode` says, and convolves the input with any weight."""

    @classmethod
    def merging(
        cls, entry: Adapter, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
    ) -> Mapping[str, Merging]:
        """Each group of output channels gains the product of its own rows of B with the rank channels it sees."""
        a, b = tensors[entry.a].flatten(1), tensors[entry.b].flatten(1)
        groups, out = len(a) // b.shape[1], len(b)
        rows, rank = out // groups, b.shape[1]
        products = [
            Product(b[g * rows : (g + 1) * rows], a[g * rank : (g + 1) * rank], g * rows) for g in range(groups)
        ]
        return {"weight": LowRank(products, entry.scale, a.shape[1])}

    def _update(self, adapter: Adapter, input: Tensor) -> Tensor:
        a, b = getattr(self, adapter.a), getattr(self, adapter.b)
        z = dropout(input, adapter.dropout) if adapter.dropout and self.training else input
        h = self._conv_forward(z, a.to(z.dtype), None)
        h = h if adapter.scale == 1.0 else h * adapter.scale
        return _CONVOLUTIONS[b.dim()](h, b.to(h.dtype), groups=self.groups)
