"""Another precision inside a module."""

from __future__ import annotations

from typing import ClassVar, Literal

from .arguments import Flag
from .calls import refuse_uncalled
from .op import Op, Target
from .registry import register

Dtype = Literal["float16", "bfloat16", "float32", "float64"]


@register("cast")
class Cast(Op):
    """The module computes in `dtype`: its inputs and its parameters, those of the modules below it too, are cast for
    the call, and what it puts out is cast back to the dtype of its first floating-point input.

    A norm or a router in float32 within a model in bfloat16, say. The parameters themselves stay what they are: in
    their dtype they are trained and saved, and their gradients arrive in it. `keep=true` leaves the output in `dtype`,
    as logits for a loss in float32 want it; then, and where no input is floating-point (an embedding), nothing is cast
    back. Adapters and norms on the module compute in `dtype` too; a scale, a cap and whatever else is done to its
    output has what was cast back. Buffers and integers are left alone.
    """

    accepts: ClassVar = {"*": "graphpatch.rewrites.cast:Casting"}
    level: ClassVar[int] = 35

    dtype: Dtype
    keep: Flag = False
    """Leave the output in `dtype`."""

    def check(self, target: Target) -> None:
        refuse_uncalled(target, self.op)

    def after(self, target: Target) -> str:
        return f"{target.signature.cls} in {self.dtype}"
