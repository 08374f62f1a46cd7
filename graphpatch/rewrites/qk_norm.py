"""`qk_norm` on an attention module, and on the projections that it goes along with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, NamedTuple, cast

from torch import Tensor, nn

from ..ops.op import Op, Refusal
from ..ops.qk_norm import QkNorm
from .norm import Norm, fill_norms
from .rewrite import InPlace


class Heads(NamedTuple):
    kind: str
    eps: float
    zero_centered: bool
    head_dim: int
    text: str


class OfHeads(NamedTuple):
    """What a projection has to know: the norm, which is the attention module's."""

    norm: nn.Module
    head_dim: int
    text: str = ""


class HeadsNormed(InPlace):
    """Of a projection: its output (... x heads * head_dim) normed head by head."""

    level: ClassVar[int] = QkNorm.level
    entries: ClassVar[str] = "_heads_normed"
    _heads_normed: tuple[OfHeads, ...] = ()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        for norm, head_dim, _ in self._heads_normed:
            output = norm(output.view(*output.shape[:-1], -1, head_dim)).view(output.shape)
        return output


class QkNormed(InPlace):
    """Of the attention module: it holds the norms, and computes as ever."""

    level: ClassVar[int] = QkNorm.level
    entries: ClassVar[str] = "_qk_norm"
    _qk_norm: tuple[Heads, ...] = ()

    @classmethod
    def entry(cls, op: Op, parameter: str | None = None) -> Heads:
        norm = cast(QkNorm, op)
        assert norm.eps is not None and norm.head_dim is not None
        return Heads(norm.kind, norm.eps, norm.zero_centered, norm.head_dim, norm.text())

    @classmethod
    def check(cls, entry: Heads, module: nn.Module) -> None:
        missing = [name for name in ("q_proj", "k_proj") if name not in module._modules]
        if missing:
            raise Refusal(
                f"{type(module).__name__} has no `{missing[0]}` whose output could be normed",
                "target the attention module that projects by q_proj and k_proj",
                code="GP555",
            )

    @classmethod
    def submodules(cls, entry: Heads, module: nn.Module) -> Mapping[str, nn.Module]:
        made = (Norm(entry.head_dim, entry.kind, entry.eps, entry.zero_centered) for _ in range(2))
        return dict(zip(("q_norm", "k_norm"), made))

    @classmethod
    def initialise(cls, entry: Heads, tensors: Mapping[str, Tensor], module: nn.Module) -> None:
        fill_norms(tensors, entry.zero_centered)

    @classmethod
    def companions(cls, entry: Heads, module: nn.Module) -> Iterable[tuple[nn.Module, type[InPlace], OfHeads]]:
        for which in "qk":
            norm = module.get_submodule(f"{which}_norm")
            yield module.get_submodule(f"{which}_proj"), HeadsNormed, OfHeads(norm, entry.head_dim)
