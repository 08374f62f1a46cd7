"""LoRA on `nn.Conv1d`, `nn.Conv2d` and `nn.Conv3d`: a convolution to rank channels, and from there one of size 1."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn.functional import conv1d, conv2d, conv3d

from .lora_options import LoraOfWeight
from .merging import LowRank, Product

_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {3: conv1d, 4: conv2d, 5: conv3d}
"""By the dimensions of a weight."""


class LoraConvolution(LoraOfWeight):
    """A convolves as the base does, with its stride, padding (mode), dilation and groups; B mixes the channels."""

    weight: Tensor
    groups: int
    _conv_forward: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    """The base's own: pads as `padding_mode` says, and convolves the input with any weight."""

    @classmethod
    def matrices(cls, module: nn.Module, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A matrix for each group."""
        weight: Tensor = module.weight  # type: ignore[assignment]
        weight, a, b = (t.unflatten(0, (module.groups, -1)).flatten(2) for t in (weight, a, b))  # type: ignore[arg-type]
        return weight, a, b

    @classmethod
    def _gained(cls, a: Tensor, b: Tensor, scale: float, shape: tuple[int, ...]) -> LowRank:
        """Each group of output channels gains the product of its own rows of B with the rank channels it sees."""
        a, b = a.flatten(1), b.flatten(1)
        groups, out = len(a) // b.shape[1], len(b)
        rows, rank = out // groups, b.shape[1]
        products = [
            Product(b[g * rows : (g + 1) * rows], a[g * rank : (g + 1) * rank], g * rows) for g in range(groups)
        ]
        return LowRank(products, scale, a.shape[1])

    def _low_rank(self, z: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        h = self._conv_forward(z, a.to(z.dtype), None)
        return _CONVOLUTIONS[b.dim()](h if scale == 1.0 else h * scale, b.to(h.dtype), groups=self.groups)

    def _product(self, z: Tensor) -> Tensor:
        return self._conv_forward(z, self.weight, None)

    def _along_rows(self, vector: Tensor) -> Tensor:
        return vector.view(-1, *(1 for _ in range(self.weight.dim() - 2)))
