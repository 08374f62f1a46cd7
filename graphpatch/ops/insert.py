"""An op at a slot of a module: before its input, or after its output."""

from __future__ import annotations

import re
from typing import Any, ClassVar, Literal

from pydantic import SerializeAsAny

from ..tree.tree import Signature, Tensor
from .calls import refuse_uncalled
from .op import Op, Refusal, Target
from .registry import register


@register("insert_before")
class InsertBefore(Op):
    """y = f(op(x)): an op that changes what a module puts out, on what this one is given.

    `insert_before("input", norm.post(kind="rms"))` norms the first argument of the module's forward, given by place or
    by name; where a call gives the same tensor twice (`attention(x, x, x)`) it is changed in each of its places. LoRA
    and all else on the module sees the changed input. `insert_after("output", norm.post(kind="rms"))` is `norm.post`
    itself. The ops that act on outputs: adapter.bottleneck, dropout, norm.post, scale.output, softcap.output, tap.

    What the op adds stands in a new module below the target, an identity that carries it: `before_norm_post`. Several
    before one input follow each other as they would after an output: by their levels.
    """

    accepts: ClassVar = {"*": "graphpatch.rewrites.insert:Preceded"}
    level: ClassVar[int] = 95

    slot: Literal["input"]
    inner: SerializeAsAny[Op]
    """The op, with its arguments: `dropout(0.1)`."""

    @property
    def child(self) -> str:
        """The name of the module that carries it."""
        return "before_" + "_".join(re.sub(r"\W+", "_", slot) for slot in sorted(self.inner.slots()))

    @property
    def rewrite(self) -> str:
        """The import path of the rewrite that an identity takes."""
        return self.inner.accepts["*"]

    @property
    def depth(self) -> tuple[int, ...]:
        return (self.level, *self.inner.depth)

    def slots(self) -> frozenset[str]:
        return frozenset(f"{slot} before the input" for slot in self.inner.slots())

    def resolved(self, target: Target) -> Op:
        return self.model_copy(update={"inner": self.inner.resolved(_input_of(target))})

    def named(self, adapter: str | None) -> Op:
        return self.model_copy(update={"inner": self.inner.named(adapter)})

    def check(self, target: Target) -> None:
        refuse_uncalled(target, self.op)
        if any(cls.rpartition(".")[2] in ("Embedding", "EmbeddingBag") for cls in target.signature.mro):
            why = f"{target.signature.cls} is given the numbers of tokens, which `{self.inner.op}` cannot change"
            raise Refusal(why, f"change what it puts out: with {self.inner.text()}", code="GP483")
        self.inner.check(_input_of(target))

    def adds(self, target: Target) -> dict[str, Tensor]:
        return {f"{self.child}.{name}": tensor for name, tensor in self.inner.adds(_input_of(target)).items()}

    def after(self, target: Target) -> str:
        return f"{self.inner.op} + {target.signature.cls}"

    def text(self) -> str:
        return f'{self.op}("{self.slot}", {self.inner.text()})'

    def arguments(self) -> dict[str, Any]:
        return {"slot": self.slot, "inner": {"op": self.inner.op, **self.inner.arguments()}}


def _input_of(target: Target) -> Target:
    """What an op sees that stands before the target: an identity, of the features that the target takes."""
    told = target.signature.attributes
    features = next((told[name] for name in ("in_features", "nx", "input_size") if name in told), None)
    shape = told.get("normalized_shape")
    if features is None and isinstance(shape, tuple) and len(shape) == 1:
        (features,) = shape
    identity = Signature(
        ("torch.nn.modules.linear.Identity", "torch.nn.modules.module.Module"),
        {} if features is None else {"out_features": features},
    )
    return target._replace(signature=identity)
