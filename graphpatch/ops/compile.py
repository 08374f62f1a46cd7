"""A module compiled by itself."""

from __future__ import annotations

from typing import ClassVar, Literal

from .arguments import Flag, Text
from .calls import refuse_uncalled
from .op import Op, Refusal, Target
from .registry import register

Mode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]


@register("compile")
class Compile(Op):
    """The module's forward is compiled by `torch.compile` when it is first called, the ops on the module included.

    Modules of one class and shape share what was compiled, so that compiling every block of a model costs one of them.
    Nothing is held by the module: its keys, copies and pickles are those of the module alone, and what compiles the
    whole model later compiles this along with it. Arguments are those of `torch.compile`.
    """

    accepts: ClassVar = {"*": "graphpatch.rewrites.compile:Compiled"}
    level: ClassVar[int] = 110

    backend: Text = "inductor"
    mode: Mode | None = None
    """Of the backend "inductor"."""
    fullgraph: Flag = False
    """Raise where the forward cannot be compiled in one piece."""
    dynamic: Flag | None = None
    """Compile for any size at once (true), or anew for each (false); left out, once a second size is met."""

    def check(self, target: Target) -> None:
        refuse_uncalled(target, self.op)
        if self.mode is not None and self.backend != "inductor":
            raise Refusal(f"the backend `{self.backend}` has no modes", "leave `mode` out", code="GP583")

    def after(self, target: Target) -> str:
        return f"compiled {target.signature.cls}"
