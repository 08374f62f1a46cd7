"""Put a module around a module."""

from __future__ import annotations

from typing import ClassVar

from .op import Target
from .registry import register
from .replace import Build


@register("wrap")
class Wrap(Build):
    """Build a module that is given the target as its first argument, and put it in the target's place:
    wrap(class="mypkg.nn.Timed", log=true) calls Timed(target, log=True).

    What it adds is on the target's device and in its dtype, and takes its train or eval mode. The target's state-dict
    keys move below the attribute under which the wrapper holds it.
    """

    accepts: ClassVar = {"*": "graphpatch.rewrites.wrap:Wrapped"}

    def after(self, target: Target) -> str:
        return f"{super().after(target)}({target.signature.cls})"
