"""`embedding.resize` on a model: the new rows, and what its embeddings and output layers do with them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.embedding_resize import MoreTokens as MoreTokensOp
from ..ops.op import Op, Refusal
from .rewrite import InPlace


class Tokens(NamedTuple):
    op: Any
    embedding: str | None
    head: str | None
    train: str
    text: str

    def table(self, module: nn.Module) -> nn.Embedding:
        return cast(nn.Embedding, module.get_submodule(self.embedding) if self.embedding else module)

    def own_head(self, module: nn.Module) -> nn.Linear | None:
        """The output layer that has a weight of its own and gains rows."""
        return None if self.head in (None, "none") else cast(nn.Linear, module.get_submodule(str(self.head)))

    def tied(self, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """All that have the embedding's weight, itself among them."""
        weight = self.table(module).weight
        return ((path, m) for path, m in module.named_modules() if m._parameters.get("weight") is weight)


class Rows(NamedTuple):
    """Which new rows a module has, and after how many of its own."""

    holder: nn.Module
    name: str
    before: int
    text: str = ""

    @property
    def weight(self) -> Tensor:
        return getattr(self.holder, self.name)  # type: ignore[no-any-return]

    @property
    def total(self) -> int:
        return self.before + self.weight.shape[0]


class NewTokens(nn.Module):
    """Rows that an op adds: of the embedding, `weight` (tokens x features), and of an untied output layer."""

    weight: Tensor

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}"


def _sized(name: str) -> property:
    """An attribute that tells of the new rows too while they are there."""

    def read(self: Any) -> Any:
        entries = getattr(self, type(self).entries_of_size)
        return entries[-1].total if entries else self.__dict__[name]

    def write(self: Any, value: Any) -> None:
        self.__dict__[name] = value

    return property(read, write)


class LookedUp(InPlace):
    """Of an embedding: the rows of the base, and after them the new ones."""

    level: ClassVar[int] = MoreTokensOp.level
    entries: ClassVar[str] = "_more_rows"
    entries_of_size: ClassVar[str] = entries
    _more_rows: tuple[Rows, ...] = ()
    num_embeddings = _sized("num_embeddings")

    def forward(self, input: Tensor) -> Tensor:
        if not self._more_rows:
            return cast(Tensor, super().forward(input))
        rows = self._more_rows[-1]
        of_base = input < rows.before
        output = cast(Tensor, super().forward(torch.where(of_base, input, 0)))
        new = F.embedding((input - rows.before).clamp(min=0), rows.weight).to(output.dtype)
        # What scales its rows on the way out (Gemma's, Bart's) scales these too.
        outer: Any = getattr(self, "embed_scale", None)
        if outer is not None:
            new = new * (outer.to(output.dtype) if isinstance(outer, Tensor) else outer)
        return torch.where(of_base.unsqueeze(-1), output, new)


class Scored(InPlace):
    """Of an output layer: the logits of the base's tokens, and after them those of the new ones."""

    level: ClassVar[int] = MoreTokensOp.level
    entries: ClassVar[str] = "_more_scores"
    entries_of_size: ClassVar[str] = entries
    _more_scores: tuple[Rows, ...] = ()
    out_features = _sized("out_features")
    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        output = cast(Tensor, super().forward(input))
        for rows in self._more_scores:
            new = F.linear(input, rows.weight.to(input.dtype))
            if self.bias is not None:
                new = new + self.bias.detach().mean()
            output = torch.cat((output, new.to(output.dtype)), -1)
        return output


class Counted(InPlace):
    """Of what knows the number of tokens, for a loss."""

    level: ClassVar[int] = MoreTokensOp.level
    entries: ClassVar[str] = "_more_tokens_known"
    entries_of_size: ClassVar[str] = entries
    _more_tokens_known: tuple[Rows, ...] = ()
    vocab_size = _sized("vocab_size")


class MoreTokens(InPlace):
    """Of the model: it holds the new rows."""

    level: ClassVar[int] = MoreTokensOp.level
    entries: ClassVar[str] = "_more_tokens"
    _more_tokens: tuple[Tokens, ...] = ()

    @classmethod
    def entry(cls, op: Op, parameter: str | None = None) -> Tokens:
        more = cast(MoreTokensOp, op)
        return Tokens(more, more.embedding, more.head, more.train, more.text())

    @classmethod
    def check(cls, entry: Tokens, module: nn.Module) -> None:
        table = entry.table(module)
        before, features = table.weight.shape
        for path, one in entry.tied(module):
            _check_tied(path, one)
        for path, buffer in module.named_buffers():
            if path.endswith("final_logits_bias"):
                raise Refusal(f"`{path}` adds to the logits of {buffer.shape[-1]} tokens and no more", code="GP482")
        tied = {id(one) for _, one in entry.tied(module)}
        if entry.head is None:
            for path, layer in _output_layers(module, before, features):
                if id(layer) not in tied:
                    raise Refusal(
                        f"the output layer `{path}` has a weight of its own, and would have no logits of new tokens",
                        f'let it gain rows too: head="{path}"',
                        'or leave it as it is: head="none"',
                        code="GP481",
                    )
        elif entry.head != "none":
            try:
                layer = module.get_submodule(entry.head)
            except AttributeError:
                raise Refusal(f"{type(module).__name__} has no `{entry.head}`", code="GP481") from None
            if not isinstance(layer, nn.Linear) or tuple(layer.weight.shape) != (before, features):
                raise Refusal(f"`{entry.head}` is no linear from {features} features to {before} tokens", code="GP481")

    @classmethod
    def submodules(cls, entry: Tokens, module: nn.Module) -> Mapping[str, nn.Module]:
        return {"new_tokens": NewTokens()}

    @classmethod
    def initialise(cls, entry: Tokens, tensors: Mapping[str, Tensor], module: nn.Module) -> None:
        sources: dict[str, nn.Module | None] = {
            "new_tokens.weight": entry.table(module),
            "new_tokens.head_weight": entry.own_head(module),
        }
        for name, rows in tensors.items():
            _fill(rows, cast(nn.Module, sources[name]), entry.op.init, getattr(module, "config", None))

    @classmethod
    def stills(cls, entry: Tokens, module: nn.Module) -> Iterable[tuple[nn.Module, str]]:
        if entry.train != "all":
            yield from ((one, "weight") for _, one in entry.tied(module))
            head = entry.own_head(module)
            if head is not None:
                yield head, "weight"

    @classmethod
    def companions(cls, entry: Tokens, module: nn.Module) -> Iterable[tuple[nn.Module, type[InPlace], Rows]]:
        new, before = module.get_submodule("new_tokens"), entry.table(module).weight.shape[0]
        rows, head = Rows(new, "weight", before), entry.own_head(module)
        counting = [one for one in module.modules() if one.__dict__.get("vocab_size") == before]
        for _, one in list(entry.tied(module)):
            yield one, LookedUp if isinstance(one, nn.Embedding) else Scored, rows
        if head is not None:
            yield head, Scored, Rows(new, "head_weight", before)
        for one in counting:
            yield one, Counted, rows

    @classmethod
    def config_values(cls, entry: Tokens, module: nn.Module) -> Mapping[str, Any]:
        config, before = module.__dict__.get("config"), entry.table(module).weight.shape[0]
        total = before + entry.op.more(before)
        if getattr(config, "vocab_size", None) == before:
            return {"vocab_size": total}
        # A model of several modalities has a config of its text part inside.
        inner = {n: copy.copy(v) for n, v in vars(config).items() if _counts(v, before)} if config is not None else {}
        for part in inner.values():
            part.vocab_size = total
        return inner


def _counts(value: Any, before: int) -> bool:
    return hasattr(value, "__dict__") and vars(value).get("vocab_size") == before


def _check_tied(path: str, module: nn.Module) -> None:
    cls = getattr(type(module), "_graphpatch_base", type(module))
    if type(module._parameters["weight"]) is not nn.Parameter:
        raise Refusal(f"the weight of `{path}` is sharded, or quantised", "resize before that", code="GP482")
    plain = cls.forward is nn.Embedding.forward or hasattr(module, "embed_scale")
    if not (isinstance(module, nn.Linear) or (isinstance(module, nn.Embedding) and plain)):
        raise Refusal(
            f"`{path or '^'}` ({cls.__name__}) has the weight and a forward of its own, whose use of it is not known",
            code="GP482",
        )


def _output_layers(module: nn.Module, tokens: int, features: int) -> Iterator[tuple[str, nn.Module]]:
    """Those of a model of Transformers, as it says, else all that look like one."""
    ask = getattr(module, "get_output_embeddings", None)
    said = ask() if ask is not None else None
    for path, layer in module.named_modules():
        if isinstance(layer, nn.Linear) and tuple(layer.weight.shape) == (tokens, features):
            if ask is None or layer is said:
                yield path, layer


def _fill(rows: Tensor, source: nn.Module, init: str, config: Any) -> None:
    if init == "zeros":
        rows.zero_()
    elif init == "mean":
        rows.copy_(cast(Tensor, source.weight).mean(0, dtype=torch.promote_types(rows.dtype, torch.float32)))
    else:
        std = getattr(config, "initializer_range", None)
        rows.normal_(std=std if isinstance(std, float) else 0.02)
