"""Look at what a module puts out."""

from __future__ import annotations

from typing import ClassVar

from .arguments import Text
from .calls import refuse_uncalled
from .op import Op, Target
from .registry import register


@register("tap")
class Tap(Op):
    """What the module puts out, under a name, for whoever listens: `with graphpatch.taps(model) as seen: model(batch)`,
    and `seen["h"]` is a list, one entry a call and tapped module, in the order of calls.

    Outputs are as they are, with their graph, so that a loss may use them. Nothing is computed otherwise, and nothing
    kept while nobody listens. Under `torch.compile` listen from the start, or compile after; a checkpointed module
    (`checkpoint`) is heard again in its backward pass.
    """

    accepts: ClassVar = {"*": "graphpatch.rewrites.tap:Tapped"}
    level: ClassVar[int] = 90
    acts_on_output: ClassVar[bool] = True
    exact_at_init: ClassVar[bool] = True

    name: Text

    def slots(self) -> frozenset[str]:
        return frozenset({f"tap {self.name}"})

    def check(self, target: Target) -> None:
        refuse_uncalled(target, self.op)

    def after(self, target: Target) -> str:
        return f"tapped {target.signature.cls}"
