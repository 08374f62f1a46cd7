"""What LoRA is on a module of any kind; how its update is computed stands in a file for each kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..ops.lora import Lora
from ..ops.lora_parts import Spread, spread_of
from ..ops.op import Op
from .dora import row_norms
from .eva import Directions, Seen
from .lora_init import STARTS
from .merging import LowRank, Merging
from .rewrite import InPlace
from .spread import of_parts, spread


class Adapter(NamedTuple):
    """One adapter on a module: the names of its factors there, and what to do with them."""

    a: str
    b: str
    scale: float
    dropout: float
    init: str
    text: str
    adapter: str | None = None
    """Its name."""
    plain: bool = True
    """Whether all it adds is s B A z: none of what follows is there."""
    bias: str = ""
    """B's, which is scaled as B's product is."""
    magnitude: str = ""
    """DoRA's: the length that each row of W + s B A is given."""
    started: tuple[str, ...] = ()
    """Copies of the A and B that it started from, where W + s (B A - B0 A0) is meant: what PiSSA and OLoRA would take
    out of the weight stays there, and is taken from the update."""
    iterations: int | None = None
    """Of the decomposition that `init` makes."""
    parameter: str | None = None
    """Which of the module's parameters gains s B A, where that was the target."""
    rank: int = 0

    spread: Spread | None = None
    """Whose rows are those of B, where it is for parts of a linear."""
    swapped: bool = False
    """A and B are those of an embedding that has the same weight: what is (out, in) here is (in, out) there."""

    pairs: tuple[Any, ...] = ()
    """Where several of the module's weights have factors: of each, `weight`, `a` and `b`."""

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of all that the adapter has on its module."""
        if self.pairs:
            return tuple(name for pair in self.pairs for name in (pair.a, pair.b))
        return (self.a, self.b, *filter(None, (self.bias, self.magnitude)), *self.started)

    def factors(self, get: Callable[[str], Tensor]) -> tuple[Tensor, Tensor]:
        """A (rank, in, ...) and B (out, rank, ...) whose product, times the scale, is what the weight gains.

        Where the adapter is told from what it started from, these have twice the rank: B A - B0 A0 is
        (B - B0) A + B0 (A - A0), which is zero bit for bit at the start, and loses nothing to cancellation later.
        `get` gives a tensor by its name.
        """
        a, b = self.pair(get)
        if not self.started:
            return a, b
        a0, b0 = map(get, self.started)
        return torch.cat([a, a - a0]), torch.cat([b - b0, b0], 1)

    def pair(self, get: Callable[[str], Tensor]) -> tuple[Tensor, Tensor]:
        """The same, without regard to what it started from."""
        a, b = get(self.a), get(self.b)
        if self.swapped:
            return b.t(), a.t()
        return (a, b) if self.spread is None else (a, spread(b, self.spread))

    def apart(self, get: Callable[[str], Tensor]) -> list[tuple[Tensor, Tensor]]:
        """A (rank, in) and B (rows, rank) of each part of each weight, as views."""
        if self.pairs:
            weights = [(get(pair.a), get(pair.b), pair.spread(get(pair.b))) for pair in self.pairs]
        elif self.spread is not None:
            weights = [(get(self.a), get(self.b), self.spread)]
        else:
            weights = [(*self.pair(get), None)]
        return [one for a, b, how in weights for one in ([(a, b)] if how is None else of_parts(a, b, how))]


class LoraModule(InPlace):
    """Adds every adapter's update to what the class below computes from the same input."""

    level: ClassVar[int] = Lora.level
    entries: ClassVar[str] = "_lora"
    by_row: ClassVar[bool] = True
    _lora: tuple[Adapter, ...] = ()  # of an instance that somebody makes of the generated class: it is a base

    @classmethod
    def entry(cls, op: Op, parameter: str | None = None) -> Adapter:
        lora = cast(Lora, op)
        return Adapter(
            lora.key("lora_A", parameter),
            lora.key("lora_B", parameter),
            lora.scale,
            lora.dropout,
            lora.init,
            f"{parameter}: {lora.text()}" if parameter else lora.text(),
            lora.adapter,
            plain=not (lora.bias or lora.dora or lora.started or lora.parts),
            bias=lora.key("lora_B_bias") if lora.bias else "",
            magnitude=lora.key("lora_magnitude") if lora.dora else "",
            started=lora.started,
            iterations=lora.iterations,
            parameter=parameter,
            spread=spread_of(lora),
            rank=lora.rank,
        )

    @classmethod
    def weighted(cls, entry: Adapter, weight: float) -> Adapter:
        return entry._replace(scale=entry.scale * weight)

    @classmethod
    def initialise(cls, entry: Adapter, tensors: Mapping[str, Tensor], module: nn.Module) -> None:
        """The factors as `init` says, and whatever else there is so that the module computes what it did."""
        with torch.no_grad():
            cls._start(entry, tensors[entry.a], tensors[entry.b], module)
            for name, source in zip(entry.started, (entry.a, entry.b)):
                tensors[name].copy_(tensors[source])
            if entry.bias:
                tensors[entry.bias].zero_()
            if entry.magnitude:
                tensors[entry.magnitude].copy_(cls.row_norms(entry, tensors.__getitem__, module))

    @classmethod
    def _start(cls, entry: Adapter, a: Tensor, b: Tensor, module: nn.Module) -> None:
        for one, other in [(a, b)] if entry.spread is None else of_parts(a, b, entry.spread):
            STARTS[entry.init](one, other, entry.scale, lambda: cls.matrix(module), entry.iterations)

    @classmethod
    def observer(cls, entry: Adapter) -> Directions | None:
        return Directions(entry.rank) if entry.init == "eva" else None

    @classmethod
    def learn(cls, entry: Adapter, tensors: Mapping[str, Tensor], seen: Seen) -> None:
        tensors[entry.a].copy_(seen.directions[: entry.rank])

    @classmethod
    def approaches(cls, entry: Adapter) -> bool:
        return entry.init == "loftq"

    @staticmethod
    def matrix(module: nn.Module) -> Tensor:
        """The module's weight as (out, in), of a kind that has one."""
        raise NotImplementedError

    @classmethod
    def matrices(cls, module: nn.Module, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The weight and the factors as (..., out, in), (..., rank, in) and (..., out, rank)."""
        return cls.matrix(module), a, b

    @classmethod
    def merging(
        cls, entry: Adapter, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
    ) -> Mapping[str, Merging]:
        """W + s B A, for a weight that is stored (out, in)."""
        return {"weight": LowRank.of(tensors[entry.b], tensors[entry.a], entry.scale)}

    @classmethod
    def measures(cls, entry: Adapter) -> bool:
        return bool(entry.magnitude)

    @classmethod
    def row_norms(cls, entry: Adapter, get: Callable[[str], Tensor], module: nn.Module) -> Tensor:
        """The lengths of the rows of what the weight becomes, (out,)."""
        return row_norms(*cls.matrices(module, *entry.factors(get)), entry.scale).flatten()

    def reset_parameters(self) -> None:
        """The base's own reset, and fresh factors: `to_empty` and `reset_parameters` leave no garbage behind."""
        reset = getattr(super(), "reset_parameters", None)
        if reset is not None:
            reset()
        for adapter in self._lora:
            self.initialise(adapter, {name: getattr(self, name) for name in adapter.tensors}, self)

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self._add_all(super().forward(input, *args, **kwargs), input)

    def _add_all(self, output: Tensor, input: Tensor) -> Tensor:
        """The output and what every adapter adds to it."""
        base = output
        for adapter in self._lora:
            output = output + self._addend(adapter, input, base).to(output.dtype)
        return output

    def _addend(self, adapter: Adapter, input: Tensor, output: Tensor) -> Tensor:
        """What one adapter adds to `output`, which is the base's for this input."""
        return self._update(adapter, input)

    def _update(self, adapter: Adapter, input: Tensor) -> Tensor:
        """What the factors give for this input: s B A z, with z the input after dropout."""
        raise NotImplementedError
