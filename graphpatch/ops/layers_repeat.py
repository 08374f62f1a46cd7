"""A deeper model of the same layers."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from .arguments import Flag
from .op import Op, Refusal, Target
from .registry import register

Bound = Annotated[int, Field(strict=True, ge=0)]
Spans = Annotated[tuple[Annotated[tuple[Bound, ...], Field(min_length=2, max_length=2)], ...], Field(min_length=1)]


@register("layers.repeat")
class LayersRepeat(Op):
    """The layers of a container are these spans of it, one after another, each from its first number up to and without
    its second: `order=[[0, 24], [8, 32]]` makes 48 layers of 32. Depth up-scaling: Kim et al., arXiv:2312.15166,
    section 2 (SOLAR).

    Another container takes the place, with keys from 0 up. A layer's first use has the parameters that the layer had,
    the same objects; its later ones have copies, which train by themselves, or with `share=true` the same once more,
    which train as one. Each use knows its own place in a key-value cache (`layer_idx`), and
    `config.num_hidden_layers`, and lists of a config with an entry a layer (`layer_types`), are those of the deeper
    model. Load the base's checkpoint before: layers stand under other keys after. What else shall change in the layers
    goes into a rule file of its own, applied afterwards.
    """

    accepts: ClassVar = {
        "torch.nn.modules.container.ModuleList": "graphpatch.rewrites.layers_repeat:LayersRepeated",
        "torch.nn.modules.container.Sequential": "graphpatch.rewrites.layers_repeat:LayersRepeated",
    }
    level: ClassVar[int] = 5
    symbol: ClassVar[Literal["~", "+", "-/+"]] = "-/+"
    exclusive: ClassVar[bool] = True

    order: Spans
    share: Flag = False

    @property
    def sources(self) -> tuple[int, ...]:
        """Of each new layer, the number of the old one."""
        return tuple(index for start, end in self.order for index in range(start, end))

    def slots(self) -> frozenset[str]:
        return frozenset({"module"})

    def check(self, target: Target) -> None:
        if not target.path:
            raise Refusal(
                f"`{self.op}` cannot act on the root: whoever holds it would keep the old one",
                "apply to a module that holds it",
            )
        for start, end in self.order:
            if start >= end:
                raise Refusal(f"[{start}, {end}] is a span of no layers", "write its first layer, then its end")

    def after(self, target: Target) -> str:
        return f"{target.signature.cls} of {len(self.sources)} layers"
