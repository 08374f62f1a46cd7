"""Put another module in a module's place."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, Field, field_validator

from .op import Op, Refusal, Target
from .registry import register


class Build(Op):
    """An op that builds a module of a class named by import path; all other arguments go to its constructor.

    The import happens when applying, and only of what the caller permits: `allow_import=["mypkg.*"]` in Python,
    `--allow-import 'mypkg.*'` on the command line.
    """

    model_config = ConfigDict(extra="allow")

    symbol: ClassVar[Literal["~", "+", "-/+"]] = "-/+"
    exclusive: ClassVar[bool] = True

    class_: str = Field(alias="class")
    """The import path, `mypkg.nn.FastRMSNorm`."""

    @field_validator("class_")
    @classmethod
    def _is_a_path(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", value):
            raise ValueError('must be an import path, "mypkg.nn.FastRMSNorm"')
        return value

    @property
    def options(self) -> Mapping[str, Any]:
        """What goes to the constructor."""
        return self.model_extra or {}

    def slots(self) -> frozenset[str]:
        return frozenset({"module"})

    def check(self, target: Target) -> None:
        if not target.path:
            raise Refusal(
                f"`{self.op}` cannot act on the root: whoever holds the model would keep the old one",
                "call the constructor yourself, or apply to a module that holds the model",
            )

    def after(self, target: Target) -> str:
        return self.class_.rpartition(".")[2]


@register("replace")
class Replace(Build):
    """Build a module of another class and put it in the target's place: replace(class="mypkg.nn.FastRMSNorm", eps=eps).

    It is built on the target's device and takes its train or eval mode. Where a parameter or buffer of the target has
    the name, shape and dtype of one of the new module, the new module takes that very tensor: weights are kept, ties
    hold, no memory is used twice. What the new module has beyond it is new; what the target had beyond it is left out.
    State-dict keys may therefore change, the module's identity does, and hooks on the old module do not come along.
    """

    accepts: ClassVar = {"*": "graphpatch.rewrites.replace:Replaced"}
