"""LoRA on `nn.ConvTranspose1d`, `2d`, `3d`: a transposed convolution to rank channels, and one of size 1 from there."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn.functional import conv1d, conv2d, conv3d, conv_transpose1d, conv_transpose2d, conv_transpose3d

from .lora_base import Adapter
from .lora_options import LoraOfWeight
from .merging import LowRank, Product, Unmergeable

_CONVOLUTIONS: dict[int, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    3: (conv_transpose1d, conv1d),
    4: (conv_transpose2d, conv2d),
    5: (conv_transpose3d, conv3d),
}
"""By the dimensions of a weight: the transposed convolution, and the one from rank channels."""


class LoraTransposedConvolution(LoraOfWeight):
    """A (in, rank / groups, kernel) is stored as the base's weight is; B (out, rank / groups, 1) mixes the channels."""

    groups: int
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    @classmethod
    def _start(cls, entry: Adapter, a: Tensor, b: Tensor, module: nn.Module) -> None:
        """As a convolution's: each rank channel sees in / groups channels of the input."""
        groups: int = module.groups  # type: ignore[assignment]
        own = a.new_empty(groups * a.shape[1], a.shape[0] // groups, *a.shape[2:])
        super()._start(entry, own, b, module)
        a.copy_(own.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1))

    @classmethod
    def _gained(cls, a: Tensor, b: Tensor, scale: float, shape: tuple[int, ...]) -> LowRank:
        """Each channel of the input gains its own product, a matrix (out / groups, kernel) of the weight's."""
        kernel, rank = a.flatten(2), b.flatten(1)  # (in, rank / groups, kernel), (out, rank / groups)
        if len(shape) < 2:
            raise Unmergeable("its weight is no parameter, but computed by a parametrization")
        outs = shape[1]
        ins = len(a) * outs // len(b)
        products = []
        for channel, of_channel in enumerate(kernel):
            group = channel // ins
            products.append(Product(rank[group * outs : (group + 1) * outs], of_channel, channel * outs))
        return LowRank(products, scale, kernel.shape[2])

    def _addend(self, adapter: Adapter, input: Tensor, output: Tensor) -> Tensor:
        a, b = getattr(self, adapter.a), getattr(self, adapter.b)
        z = self._dropped(adapter, input)
        up, mix = _CONVOLUTIONS[b.dim()]
        dims = b.dim() - 2
        # As much as the output is larger than the least that the input gives, be it by attribute or `output_size`.
        extra = [
            output.shape[i - dims] - ((z.shape[i - dims] - 1) * s - 2 * p + d * (k - 1) + 1)
            for i, (s, p, d, k) in enumerate(zip(self.stride, self.padding, self.dilation, a.shape[2:]))
        ]
        h = up(z, a.to(z.dtype), None, self.stride, self.padding, extra, self.groups, self.dilation)
        added = mix(h if adapter.scale == 1.0 else h * adapter.scale, b.to(h.dtype), groups=self.groups)
        return added + self._scaled_bias(adapter, added) if adapter.bias else added

    def _along_rows(self, vector: Tensor) -> Tensor:
        return vector.view(-1, *(1 for _ in self.stride))
