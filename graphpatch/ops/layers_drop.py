"""Leave layers out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

from pydantic import Field

from ..tree.tree import Signature
from .arguments import Text
from .op import Op, Refusal, Target
from .registry import register

Indices = Annotated[tuple[Annotated[int, Field(strict=True)], ...], Field(min_length=1)]


@register("layers.drop")
class LayersDrop(Op):
    """The layers of a container with these indices, from the end where negative, are not computed: what iterates over
    the container, slices it or asks for its length sees the others.

    The layers stay where they are, under their names and keys, so that base checkpoints load before and after, and
    indices in rules stay those of the original. `config.num_hidden_layers`, and lists of a config with an entry a layer
    (`layer_types`), are those of the layers that are left, and so are their places in a key-value cache (`layer_idx`).
    Gromov et al., arXiv:2403.17887, on which layers can be spared.
    """

    accepts: ClassVar = {
        "torch.nn.modules.container.ModuleList": "graphpatch.rewrites.layers_drop:LayersDropped",
        "torch.nn.modules.container.Sequential": "graphpatch.rewrites.layers_drop:LayersDropped",
    }
    level: ClassVar[int] = 5

    indices: Indices
    container: Text | None = Field(default=None, kw_only=True)
    """The path of the container below the model whose config speaks of it; filled in from the target of the rule."""

    def seat(self, above: Sequence[Signature]) -> int:
        configured = [number for number, signature in enumerate(above[:-1]) if signature.config >= 0]
        if not configured:
            return len(above) - 1
        # A model and the one around it have the same config, and generation asks the outer one.
        return next(n for n in configured if above[n].config == above[configured[-1]].config)

    def resolved(self, target: Target) -> Op:
        return self.model_copy(update={"container": target.path_in_seat})

    def check(self, target: Target) -> None:
        if len(set(self.indices)) < len(self.indices):
            raise Refusal("an index is given twice")

    def after(self, target: Target) -> str:
        return f"{target.seat.cls} of fewer layers"
