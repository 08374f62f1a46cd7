"""`head.value` and `head.embed` on models of Transformers: the output gains a field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, cast

from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.head_beside import Embed, Value
from ..ops.op import Op
from .head import OnModel, fill_linear
from .head_states import WithStates
from .head_transformers import check_pooler
from .pooling import pooled


class OneValue(NamedTuple):
    name: str
    hidden: int
    dropout: float
    init: str
    text: str


class ValueHead(nn.Module):
    """States (B x S x H) to values (B x S), in float32 as TRL's."""

    def __init__(self, hidden: int, dropout: float):
        super().__init__()
        self.dropout, self.summary = nn.Dropout(dropout), nn.Linear(hidden, 1)

    def forward(self, states: Tensor) -> Tensor:
        states = self.dropout(states).to(self.summary.weight.dtype)
        return cast(Tensor, self.summary(states)).squeeze(-1).float()


class WithValue(OnModel):
    """Holds a `ValueHead`, under the name that the op gives it."""

    level: ClassVar[int] = Value.level
    entries: ClassVar[str] = "_head_value"
    _head_value: tuple[OneValue, ...] = ()

    @classmethod
    def entry(cls, op: Op, parameter: str | None = None) -> OneValue:
        value = cast(Value, op)
        assert value.hidden is not None
        return OneValue(value.name, value.hidden, value.dropout, value.init, value.text())

    @classmethod
    def submodules(cls, entry: OneValue, module: nn.Module) -> Mapping[str, nn.Module]:
        return {entry.name: ValueHead(entry.hidden, entry.dropout)}

    @classmethod
    def initialise(cls, entry: OneValue, tensors: Mapping[str, Tensor], module: nn.Module) -> None:
        fill_linear(module, tensors, f"{entry.name}.summary", entry.init)


class Valued(WithValue, WithStates):
    """A value for each token."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self._head_value:
            return super().forward(*args, **kwargs)
        output, states, as_tuple = self.with_states(args, kwargs)
        for entry in self._head_value:
            output["value"] = getattr(self, entry.name)(states)
        return output.to_tuple() if as_tuple else output


class Pooled(NamedTuple):
    pool: str
    normalize: bool
    hidden: int
    dim: int | None
    """Of the projection; None where there is none."""
    text: str


class Projected(OnModel):
    """Holds the projection of an embedding, where it has one."""

    level: ClassVar[int] = Embed.level
    entries: ClassVar[str] = "_head_embed"
    _head_embed: tuple[Pooled, ...] = ()

    @classmethod
    def entry(cls, op: Op, parameter: str | None = None) -> Pooled:
        embed = cast(Embed, op)
        assert embed.hidden is not None
        dim = embed.dim if embed.projects else None
        return Pooled(embed.pool, embed.normalize, embed.hidden, dim, embed.text())

    @classmethod
    def submodules(cls, entry: Pooled, module: nn.Module) -> Mapping[str, nn.Module]:
        return {} if entry.dim is None else {"projection": nn.Linear(entry.hidden, entry.dim, bias=False)}

    @classmethod
    def initialise(cls, entry: Pooled, tensors: Mapping[str, Tensor], module: nn.Module) -> None:
        if entry.dim is not None:
            fill_linear(module, tensors, "projection", "normal")


class Embedding(Projected, WithStates):
    """A vector for each sequence."""

    @classmethod
    def check(cls, entry: Pooled, module: nn.Module) -> None:
        check_pooler(entry.pool, module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self._head_embed:
            return super().forward(*args, **kwargs)
        entry = self._head_embed[0]
        output, states, as_tuple = self.with_states(args, kwargs)
        real = self.real_tokens(self.named(args, kwargs), states)
        vector = output.pooler_output if entry.pool == "pooler" else pooled(states, real, entry.pool)
        if entry.dim is not None:
            vector = cast(nn.Module, self.projection)(vector)
        output["sentence_embedding"] = F.normalize(vector, dim=-1) if entry.normalize else vector
        return output.to_tuple() if as_tuple else output
