"""LoRA on the `Conv1D` of Transformers (GPT-2 and its kin): no convolution, but a linear whose weight is (in, out)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import dropout

from .lora import LoraLinear
from .low_rank import LinearWithLowRank, fusible
from .rewrite import InPlace


class LoraConv1D(LoraLinear):
    """The factors are those of a linear, so the weight's own delta is s (B A)^T."""

    transposed = True

    @classmethod
    def variant(cls, below: type) -> type[InPlace]:
        # Told by its module, since transformers need not be installed.
        forward = getattr(below, "forward", None)
        return LoraPlainConv1D if getattr(forward, "__module__", "") == "transformers.pytorch_utils" else cls

    @staticmethod
    def matrix(module: nn.Module) -> Tensor:
        return module.weight.t()  # type: ignore[operator,no-any-return]

    def __repr__(self) -> str:
        # The class writes its line itself and asks no `extra_repr`.
        line, said = super().__repr__(), self.extra_repr()
        return f"{line.removesuffix(')')}, {said})" if said and said not in line else line


class LoraPlainConv1D(LoraConv1D):
    """The same where the class below is `Conv1D` itself: its product is fused in training."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        adapters = self._lora
        if len(adapters) == 1 and fusible(x, self.weight):
            adapter = adapters[0]
            if not adapter.plain:
                return self._fused(adapter, x, self.weight.t())
            z = dropout(x, adapter.dropout) if adapter.dropout and self.training else None
            a, b = getattr(self, adapter.a), getattr(self, adapter.b)
            return LinearWithLowRank.apply(x, z, self.weight.t(), self.bias, a, b, adapter.scale)  # type: ignore[no-any-return,no-untyped-call]
        return super().forward(x)
