"""Keep a frozen weight in fewer bits."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Annotated, ClassVar

from pydantic import Field

from .arguments import Flag
from .calls import refuse_uncalled
from .op import Op, Refusal, Target
from .registry import register

_FLOATS = ("float64", "float32", "bfloat16", "float16")
_Even = Annotated[int, Field(strict=True, ge=2, multiple_of=2)]


class Quantize(Op):
    """What the three have in common."""

    accepts: ClassVar = {
        "torch.nn.modules.linear.Linear": "graphpatch.rewrites.quantize:Quantized",
        "transformers.pytorch_utils.Conv1D": "graphpatch.rewrites.quantize:Quantized",
    }
    level: ClassVar[int] = 0

    @property
    def per_scale(self) -> int | None:
        """How many values of a row share a scale; None for all of them."""
        raise NotImplementedError

    def size(self, shape: tuple[int, ...]) -> int:
        """The bytes that a weight of this shape takes."""
        raise NotImplementedError

    def slots(self) -> frozenset[str]:
        return frozenset({"weight"})

    @property
    def keeps(self) -> bool:
        """Whether the original stays in memory."""
        return bool(getattr(self, "keep", True))

    def check(self, target: Target) -> None:
        refuse_uncalled(target, self.op)
        cls, weight = target.signature.cls, target.signature.parameters.get("weight")
        if weight is None or len(weight.shape) != 2 or 0 in weight.shape:
            has = f"one of shape {list(weight.shape)}" if weight else "none of its own"
            raise Refusal(f"`{self.op}` needs a weight of two dimensions, and {cls} has {has}", code="GP461")
        if weight.dtype not in _FLOATS:
            raise Refusal(
                f"the weight of {cls} is {weight.dtype} already",
                "leave it out: a quantised base takes LoRA as it is, with lora(...) alone",
                code="GP462",
            )
        if "weight" in target.tied:
            raise Refusal(
                f"the weight of {cls} is {target.tied['weight'][0]} too, which must go on reading it as it is",
                "leave it out: except @head",
                code="GP424",
            )
        columns, block = weight.shape[1], self.per_scale
        if block is not None and columns % block:
            name = "in_features" if "in_features" in target.signature.attributes else "nf"
            raise Refusal(
                f"the rows of {cls}'s weight have {columns} values, which blocks of {block} do not divide",
                f"take those that fit: where {name} % {block} == 0",
                *(f"or a smaller block: {size}" for size in (32, 16) if columns % size == 0 and size < block),
                code="GP463",
            )

    def represents(self, target: Target) -> Mapping[str, int]:
        return {"weight": self.size(target.signature.parameters["weight"].shape)}

    def after(self, target: Target) -> str:
        return f"{self.op.rpartition('.')[2]} {target.signature.cls}"


@register("quantize.nf4")
class QuantizeNF4(Quantize):
    """Keep the weight of a linear in 4-bit NormalFloat: w = scale * level, one of sixteen levels for each value and one
    float32 scale, the largest magnitude, for each `block` values of a row: 4.5 bits a value at 64.

    The module stays what it is, and its weight a parameter with its name, shape and dtype; it is frozen, and made dense
    anew for each product, forward and backward. A checkpoint of the base loads into it, and is quantised on the way.
    A plan shows what it saves. Chain `lora` behind it, and the rule is QLoRA: `quantize.nf4() then lora(rank=64)`.

    Dettmers et al., QLoRA, arXiv:2305.14314, section 3: the levels are quantiles of a normal distribution, rounded to
    nearest. The values are those of bitsandbytes with `bnb_4bit_use_double_quant=False`, its default.
    """

    block: _Even = 64
    """Values that share a scale; they must divide the row."""
    keep: Flag = True
    """Whether the original weight is kept too, so that the patch can be reverted. `false` lets it go, which
    is what saves memory; revert() is refused then, and the base is loaded anew instead."""

    @property
    def per_scale(self) -> int:
        return self.block

    def size(self, shape: tuple[int, ...]) -> int:
        return prod(shape) // 2 + 4 * prod(shape) // self.block


@register("quantize.int8")
class QuantizeInt8(Quantize):
    """Keep the weight of a linear in 8 bits: w = scale * q, q a whole number of -128 to 127, one float32 scale for each
    row, which is the largest magnitude / 127.5. It computes and is kept as under `quantize.nf4`.

    The values are those of torchao's `Int8WeightOnlyConfig()`. Dettmers et al., LLM.int8(), arXiv:2208.07339, section
    2.1, quantise weights so; no outliers are kept apart here, since activations are not quantised.
    """

    keep: Flag = True
    """As in `quantize.nf4`."""

    @property
    def per_scale(self) -> None:
        return None

    def size(self, shape: tuple[int, ...]) -> int:
        return prod(shape) + 4 * shape[0]


@register("quantize.int4")
class QuantizeInt4(Quantize):
    """Keep the weight of a linear in 4 bits: w = least + step * q, q a whole number of 0 to 15, `least` and `step`
    float32, one each for every `group` values of a row: 4.5 bits a value at 128. It computes and is kept as under
    `quantize.nf4`, which is nearer to normally distributed weights at the same size.

    The grid is that of torchao's `Int4WeightOnlyConfig` (asymmetric, zero need not be on it), in float32.
    """

    group: _Even = 128
    """Values that share a grid; they must divide the row."""
    keep: Flag = True
    """As in `quantize.nf4`."""

    @property
    def per_scale(self) -> int:
        return self.group

    def size(self, shape: tuple[int, ...]) -> int:
        return prod(shape) // 2 + 8 * prod(shape) // self.group
