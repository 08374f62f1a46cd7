"""`head.medusa` on causal language models of Transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.head_medusa import Medusa
from ..ops.op import Op, Refusal
from .head_states import WithStates


class Heads(NamedTuple):
    n: int
    decay: float
    hidden: int
    text: str


class ResBlock(nn.Module):
    def __init__(self, hidden: int):
        super().__init__()
        self.linear = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.silu(self.linear(x))


class Medusas(WithStates):
    """Logits of the tokens after the next, n x B x S x V."""

    level: ClassVar[int] = Medusa.level
    entries: ClassVar[str] = "_head_medusa"
    _head_medusa: tuple[Heads, ...] = ()

    @classmethod
    def entry(cls, op: Op, parameter: str | None = None) -> Heads:
        medusa = cast(Medusa, op)
        assert medusa.hidden is not None
        return Heads(medusa.n, medusa.decay, medusa.hidden, medusa.text())

    @classmethod
    def check(cls, entry: Heads, module: nn.Module) -> None:
        head = module.get_output_embeddings()  # type: ignore[operator]
        width = getattr(getattr(head, "weight", None), "shape", (0, 0))[-1]
        if width != entry.hidden:
            raise Refusal(
                f"{type(module).__name__} has no language-model head of {entry.hidden} features to start from",
                "target a causal language model",
                code="GP570",
            )

    @classmethod
    def submodules(cls, entry: Heads, module: nn.Module) -> Mapping[str, nn.Module]:
        words = module.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
        one = [
            nn.Sequential(ResBlock(entry.hidden), nn.Linear(entry.hidden, words, bias=False)) for _ in range(entry.n)
        ]
        return {"medusa_head": nn.ModuleList(one)}

    @classmethod
    def initialise(cls, entry: Heads, tensors: Mapping[str, Tensor], module: nn.Module) -> None:
        start = module.get_output_embeddings().weight  # type: ignore[operator]
        for name, tensor in tensors.items():
            tensor.zero_() if ".linear." in name else tensor.copy_(start)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self._head_medusa:
            return super().forward(*args, **kwargs)
        output, states, as_tuple = self.with_states(args, kwargs)
        logits = torch.stack([head(states) for head in cast(nn.ModuleList, self.medusa_head)])
        labels = self.named(args, kwargs).get("labels")
        if labels is not None:
            for k, one in enumerate(logits, 1):
                ahead = labels[:, k + 1 :].reshape(-1).to(one.device)
                near = one[:, : labels.shape[1] - k - 1].float().reshape(-1, one.shape[-1])
                if ahead.numel():
                    output["loss"] = output.loss + self._head_medusa[0].decay ** k * F.cross_entropy(near, ahead)
        output["medusa_logits"] = logits
        return output.to_tuple() if as_tuple else output
