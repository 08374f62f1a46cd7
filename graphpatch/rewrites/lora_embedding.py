"""LoRA on `nn.Embedding`: the row of a token gains s B times the column that A has for it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import dropout, embedding, linear

from ..lang.diagnostics import ApplyError, Diagnostic
from .lora_base import Adapter
from .lora_options import LoraOfWeight


class LoraEmbedding(LoraOfWeight):
    """A linear on one-hot inputs, without making any: A is looked up, B multiplied."""

    weight: Tensor
    transposed = True
    padding_idx: int | None
    scale_grad_by_freq: bool

    @classmethod
    def _start(cls, entry: Adapter, a: Tensor, b: Tensor, module: nn.Module) -> None:
        """A zero and B standard normal, as PEFT has it. The padding's column of A has no gradient and so stays zero,
        and the padding's row what it was, which it would not with A random."""
        a.zero_()
        b.normal_()

    @staticmethod
    def matrix(module: nn.Module) -> Tensor:
        return module.weight.t()  # type: ignore[operator,no-any-return]

    def _update(self, adapter: Adapter, input: Tensor) -> Tensor:
        a, b = getattr(self, adapter.a), getattr(self, adapter.b)
        return self._dropping(adapter, self._low_rank(input, a, b, adapter.scale))

    def _addend(self, adapter: Adapter, input: Tensor, output: Tensor) -> Tensor:
        if adapter.plain:
            return self._update(adapter, input)
        added = self._low_rank(input, getattr(self, adapter.a), getattr(self, adapter.b), adapter.scale)
        return self._dropping(adapter, added + self._gain_less_one(adapter, output) * (output + added))

    def _low_rank(self, z: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        if a.shape[1] != self.weight.shape[0]:
            raise _outgrown(a.shape[1], self.weight.shape[0])
        dtype = self.weight.dtype
        h = embedding(z, a.t(), self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq).to(dtype)
        delta = linear(h if scale == 1.0 else h * scale, b.to(dtype)).to(dtype)
        # What scales its rows on the way out (Gemma's, Bart's) scales the sum of both.
        outer: Any = getattr(self, "embed_scale", None)
        return delta if outer is None else delta * (outer.to(dtype) if isinstance(outer, Tensor) else outer)

    def _dropping(self, adapter: Adapter, added: Tensor) -> Tensor:
        """An embedding's input is one number that is not zero, so that is dropped or kept: all that a token gains."""
        if not (adapter.dropout and self.training):
            return added
        return added * dropout(added.new_ones(added.shape[:-1]), adapter.dropout).unsqueeze(-1)


def _outgrown(before: int, now: int) -> ApplyError:
    return ApplyError(
        Diagnostic(
            "GP655",
            f"an embedding of {before} tokens was patched, and has {now} by now",
            fixes=("resize first (`resize_token_embeddings`), then apply the rules",),
        )
    )
