"""LoRA on modules of megatron-core that hold many experts: each of this rank's has factors of its own, in one stack.

The dispatcher gives the experts their tokens, gathered over the ranks that share an expert, and sums what those put
out. So nothing is communicated here, but for the gradient of a factor that all of them have whole.

`GroupedMLP` needs the package grouped_gemm, and was tested on a CPU with another product in its place. Transformer
Engine's linears are found by name; written against their documented interface, and tested on stand-ins.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from ..ops.op import Refusal
from ..rewrites.grouped import grouped_mm
from ..rewrites.lora_base import Adapter, LoraModule
from ..rewrites.lora_experts import LoraStacks
from ..rewrites.lora_init import STARTS
from ..rewrites.merging import LowRank, Merging
from ..rewrites.rewrite import InPlace
from .experts import MLP, experts_of, stack_of
from .factors import Sharded
from .lora import summed_backward
from .sharding import Cut, Marks, drawn_alike, dropping_apart, group_of, replicated_marks, row_stride, sharded_marks


class LoraOfExperts(Sharded, LoraStacks):
    """A (experts, rank, in) and B (experts, out, rank). Where ranks share the rows of an expert, B is shared along
    them; where they share its columns, A."""

    @classmethod
    def _by_rows(cls, entry: Adapter) -> bool:
        """Whether ranks share the rows (features out) of each expert."""
        raise NotImplementedError

    @classmethod
    def attributes(cls, entry: Adapter, module: nn.Module) -> Mapping[str, Marks]:
        # Summed on the way back by `summed_backward`, so that no one else must.
        whole = replicated_marks(module, partial=False)
        if cls._by_rows(entry):
            return {entry.a: whole, entry.b: sharded_marks(module, 1, row_stride(module))}
        return {entry.a: sharded_marks(module, 2), entry.b: whole}

    @classmethod
    def _start(cls, entry: Adapter, a: Tensor, b: Tensor, module: nn.Module) -> None:
        """A is drawn for all experts, whole, and cut: the same function of a run's seed on any layout of ranks."""
        experts, size = experts_of(module), group_of(module).size()
        assert experts is not None
        cuts = [Cut(0, (experts.here,), experts.group)]
        shape = [experts.here * experts.group.size(), *a.shape[1:]]
        if not cls._by_rows(entry):
            cuts.append(Cut(2, (a.shape[2],), group_of(module)))
            shape[2] *= size
        whole = torch.empty(shape, dtype=a.dtype)
        with drawn_alike(module):
            for one in whole:
                STARTS[entry.init](one, b, entry.scale, lambda: b, None)
        for cut in cuts:
            whole = cut.own(whole)
        a.copy_(whole)

    def _factors(self, adapter: Adapter) -> tuple[Tensor, Tensor]:
        a, b = super()._factors(adapter)
        return (summed_backward(a, self), b) if self._by_rows(adapter) else (a, summed_backward(b, self))

    def _dropped(self, adapter: Adapter, input: Tensor) -> Tensor:
        if not (adapter.dropout and self.training):
            return input
        with dropping_apart(self, not self._by_rows(adapter)):
            return dropout(input, adapter.dropout)


class LoraGroupedMLP(LoraOfExperts):
    """`weight1` and `weight2`, of which each expert has a block: (in, out), one behind the other."""

    transposed = True
    activation_recompute: bool
    activation_func_with_probs: Any
    config: Any

    @classmethod
    def _by_rows(cls, entry: Adapter) -> bool:
        return entry.parameter == "weight1"

    @classmethod
    def check(cls, entry: Adapter, module: nn.Module) -> None:
        owner = next(c for c in type(module).__mro__ if "forward" in c.__dict__ and not issubclass(c, InPlace))
        if owner.__name__ != MLP:
            raise Refusal(
                f"{type(module).__name__} has a forward of its own, so `lora` does not know what it does with experts",
                f"leave its experts out, or give it the forward of {MLP}",
                code="GP523",
            )

    def forward(self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor) -> Any:  # type: ignore[override]
        x, probs = permuted_local_hidden_states, permuted_probs.unsqueeze(-1)
        if not self._lora:
            return super(LoraModule, self).forward(x, tokens_per_expert, permuted_probs)
        if self.config.moe_apply_probs_on_input:
            x, probs = (probs * x).to(x.dtype), torch.ones_like(probs)
        h = self._project("weight1", x, tokens_per_expert)
        if not self.activation_recompute:
            return self._project("weight2", self.activation_func_with_probs(h, probs), tokens_per_expert), None
        from megatron.core.tensor_parallel import CheckpointWithoutOutput

        checkpoint = CheckpointWithoutOutput(None)  # no fp8, which its default would mean
        h = checkpoint.checkpoint(self.activation_func_with_probs, h, probs)
        y = self._project("weight2", h, tokens_per_expert)
        checkpoint.discard_output_and_register_recompute(y)
        return y, None

    def _project(self, name: str, x: Tensor, tokens: Tensor) -> Tensor:
        from megatron.core.transformer.moe import grouped_gemm_util

        stack = stack_of(self, name)
        assert stack is not None
        weight, ends = getattr(self, name).view(stack.view), tokens.to(x.device).cumsum(0)
        # The kernel of GroupedMLP must have a token.
        kernel = grouped_gemm_util.ops.gmm
        y = kernel(x, weight, tokens, trans_b=False) if x.nelement() else grouped_mm(x, weight, ends)
        return self._add_grouped(y, x, ends, name)


class LoraTEGrouped(LoraOfExperts):
    """One weight an expert: `weight0`, `weight1` and so on."""

    @classmethod
    def check(cls, entry: Adapter, module: nn.Module) -> None:
        if getattr(module.config, "moe_mlp_glu_interleave_size", None):
            raise Refusal(
                "the config lays gate and up by turns (moe_mlp_glu_interleave_size), and `lora` knows them one behind "
                "the other",
                "build the model without moe_mlp_glu_interleave_size",
                code="GP951",
            )

    @classmethod
    def merging(
        cls, entry: Adapter, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
    ) -> Mapping[str, Merging]:
        pairs = enumerate(zip(tensors[entry.b], tensors[entry.a]))
        return {f"weight{at}": LowRank.of(b, a, entry.scale) for at, (b, a) in pairs}

    def forward(self, x: Tensor, m_splits: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        output, bias = super(LoraModule, self).forward(x, m_splits, *args, **kwargs)
        if self._lora:
            ends = torch.as_tensor(m_splits, device=x.device).cumsum(0)
            output = self._add_grouped(output, x, ends, None)
        return output, bias


class LoraTEGroupedColumn(LoraTEGrouped):
    @classmethod
    def _by_rows(cls, entry: Adapter) -> bool:
        return True


class LoraTEGroupedRow(LoraTEGrouped):
    @classmethod
    def _by_rows(cls, entry: Adapter) -> bool:
        return False
