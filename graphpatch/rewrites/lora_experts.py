"""LoRA on stacked experts: the low-rank product is that of the tokens routed to an expert, never of its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from ..lang.diagnostics import ApplyError, Diagnostic
from .grouped import grouped_mm
from .lora_base import Adapter, LoraModule
from .merging import LowRank, Merging, Product
from .rewrite import InPlace


class LoraStacks(LoraModule):
    """A (experts, rank, in) and B (experts, out, rank), for each of a module's stacks."""

    by_row = False  # rows are tokens here, in the order of experts
    transposed: ClassVar[bool] = False
    """Whether a stack is stored (experts, in, out)."""

    @classmethod
    def merging(
        cls, entry: Adapter, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
    ) -> Mapping[str, Merging]:
        """One product an expert, in the rows that are its own."""
        assert entry.parameter is not None
        left, right = tensors[entry.b], tensors[entry.a]
        if cls.transposed:
            left, right = right.mT, left.mT
        products = [Product(b, a, at * b.shape[0]) for at, (b, a) in enumerate(zip(left, right))]
        return {entry.parameter: LowRank(products, entry.scale, right.shape[2])}

    @classmethod
    def _start(cls, entry: Adapter, a: Tensor, b: Tensor, module: nn.Module) -> None:
        """Each expert as a linear of its own."""
        for of_one in zip(a, b):
            super()._start(entry, *of_one, module)

    def _add_grouped(self, output: Tensor, input: Tensor, ends: Tensor, stack: str | None) -> Tensor:
        """The output of a stack and the update of every adapter there, for rows sorted by expert."""
        for adapter in self._lora:
            if adapter.parameter == stack:
                z = self._dropped(adapter, input)
                a, b = self._factors(adapter)
                h = grouped_mm(z, a.to(z.dtype).mT, ends)
                output = torch.add(output, grouped_mm(h, b.to(z.dtype).mT, ends), alpha=adapter.scale)
        return output

    def _dropped(self, adapter: Adapter, input: Tensor) -> Tensor:
        return dropout(input, adapter.dropout) if adapter.dropout and self.training else input

    def _factors(self, adapter: Adapter) -> tuple[Tensor, Tensor]:
        return getattr(self, adapter.a), getattr(self, adapter.b)


class LoraExperts(LoraStacks):
    """Experts that Transformers dispatches. Whichever implementation the config names, this one takes its place: the
    tokens are sorted by expert, each expert computes on its own, and the sum is in the order in which they came."""

    config: Any
    act_fn: Any
    _apply_gate: Any
    post_expert_norm: Any
    has_gate = True
    has_bias = False
    is_transposed = False
    has_post_expert_norm = False
    _is_expert_parallel = False

    @classmethod
    def variant(cls, below: type) -> type[InPlace]:
        forward: Any = getattr(below, "forward", None)
        known = f"{below.__module__}.{below.__qualname__}" in _ALIKE or (
            hasattr(below, "_apply_gate") and _is_dispatched(forward)
        )
        if not known:
            raise ApplyError(
                Diagnostic(
                    "GP523",
                    f"{below.__qualname__} has a forward of its own, so `lora` does not know what it does with experts",
                    fixes=("leave its experts out, or give it the forward of the class it derives from",),
                )
            )
        return cls

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:  # type: ignore[override]
        if not self._lora:
            return super().forward(hidden_states, top_k_index, top_k_weights)
        self._refuse_unknown()
        chosen = top_k_index.shape[-1]
        sorted_ids, order = torch.sort(top_k_index.reshape(-1))
        weights = top_k_weights.reshape(-1)[order]
        up = "gate_up_proj" if self.has_gate else "up_proj"
        experts = getattr(self, up).shape[0]
        ends = torch.searchsorted(sorted_ids, torch.arange(experts, device=sorted_ids.device), right=True)
        # Under expert parallelism, what goes to other ranks has a number beyond the last, and stays zero.
        away = (sorted_ids >= experts).unsqueeze(-1) if self._is_expert_parallel else None
        ids = sorted_ids if away is None else sorted_ids.clamp(max=experts - 1)

        x = hidden_states[order // chosen]
        y = self._project(up, x, ends, ids, away)
        y = self._apply_gate(y) if self.has_gate else self.act_fn(y)
        y = self._project("down_proj", y, ends, ids, away)
        if self.has_post_expert_norm:
            y = self.post_expert_norm(y)
        y = y * weights.unsqueeze(-1)
        if away is not None:
            y = y.masked_fill(away, 0.0)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.shape[0], device=order.device)
        y = y[back].view(hidden_states.shape[0], chosen, hidden_states.shape[-1]).sum(dim=1)
        return y.to(hidden_states.dtype)

    def _project(self, stack: str, x: Tensor, ends: Tensor, ids: Tensor, away: Tensor | None) -> Tensor:
        weight = getattr(self, stack)
        x = x.to(weight.dtype)
        y = grouped_mm(x, weight if self.is_transposed else weight.mT, ends)
        if self.has_bias:
            y = y + getattr(self, f"{stack}_bias")[ids]
        y = self._add_grouped(y, x, ends, stack)
        return y if away is None else y.masked_fill(away, 0.0)

    def _refuse_unknown(self) -> None:
        """An implementation that somebody registered may compute something else."""
        name = getattr(getattr(self, "config", None), "_experts_implementation", None)
        if name not in _EQUAL:
            raise ApplyError(
                Diagnostic(
                    "GP524",
                    f'the experts are set to the implementation "{name}", which the adapter on them takes the place of',
                    text=(f"{', '.join(sorted(n for n in _EQUAL if n))} compute the same; of {name} nothing is known",),
                    fixes=('model.set_experts_implementation("grouped_mm")', "or patch.revert()"),
                )
            )


class LoraTransposedExperts(LoraExperts):
    """gpt-oss, Aria: the same, stored the other way round."""

    transposed = True


_EQUAL = {None, "eager", "batched_mm", "grouped_mm", "deepgemm", "sonicmoe"}
_ALIKE = {"transformers.models.step3p7.modeling_step3p7.Step3p7Experts"}
"""Not dispatched, with the forward that the others have when they are eager."""


def _is_dispatched(forward: Any) -> bool:
    """Whether `use_experts_implementation` made it: told by the function's own globals, since it bears another name."""
    return getattr(forward, "__globals__", {}).get("__name__", "") == "transformers.integrations.moe"


class LoraSpreadExperts(LoraStacks):
    """Llama 4: every expert gets every token, scaled by what the router gives it."""

    transposed = True
    gate_up_proj: Tensor
    down_proj: Tensor
    act_fn: Any

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        if not self._lora:
            return super().forward(hidden_states)
        x = hidden_states.view(self.gate_up_proj.shape[0], -1, hidden_states.shape[-1])
        gate, up = self._project("gate_up_proj", x).chunk(2, dim=-1)
        return self._project("down_proj", up * self.act_fn(gate)).view(-1, hidden_states.shape[-1])

    def _project(self, stack: str, x: Tensor) -> Tensor:
        y = torch.bmm(x, getattr(self, stack))
        for adapter in self._lora:
            if adapter.parameter == stack:
                z = self._dropped(adapter, x)
                a, b = self._factors(adapter)
                h = torch.bmm(z, a.to(z.dtype).mT)
                y = torch.add(y, torch.bmm(h, b.to(h.dtype).mT), alpha=adapter.scale)
        return y


class LoraParallelExperts(LoraStacks):
    """JetMoE: a linear of many experts, called with the rows of each, already sorted, and how many they are."""

    def forward(self, inputs: Tensor, expert_size: Any) -> Tensor:  # type: ignore[override]
        output: Tensor = super(LoraModule, self).forward(inputs, expert_size)
        ends = torch.as_tensor(expert_size).cumsum(0)
        return self._add_grouped(output, inputs, ends, "weight")
