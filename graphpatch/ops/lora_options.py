"""Which options of LoRA have their effect on which targets: the rest is refused, never ignored."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .lora_attention import FUSED, SEPARATE
from .lora_shapes import factor_shapes
from .op import Refusal, Target

if TYPE_CHECKING:
    from .lora import Lora

LINEAR = frozenset({"graphpatch.rewrites.lora:LoraLinear", "graphpatch.rewrites.lora_conv1d:LoraConv1D"})
ENGINE = {
    "TEColumnParallelLinear": "graphpatch.megatron.lora_te:LoraTEColumn",
    "TELayerNormColumnParallelLinear": "graphpatch.megatron.lora_te:LoraTELayerNormColumn",
    "TERowParallelLinear": "graphpatch.megatron.lora_te:LoraTERow",
}
"""Those of Transformer Engine, as megatron-core calls them."""
GROUPED = {
    "TEColumnParallelGroupedLinear": "graphpatch.megatron.lora_grouped:LoraTEGroupedColumn",
    "TERowParallelGroupedLinear": "graphpatch.megatron.lora_grouped:LoraTEGroupedRow",
}
"""Of those the ones that are a linear for each of many experts."""
PARALLEL = frozenset(
    {"graphpatch.megatron.lora:LoraColumnParallel", "graphpatch.megatron.lora:LoraRowParallel", *ENGINE.values()}
)
"""The linears of megatron-core."""
PARALLEL_EMBEDDING = "graphpatch.megatron.lora_embedding:LoraVocabParallelEmbedding"
EMBEDDING = frozenset({"graphpatch.rewrites.lora_embedding:LoraEmbedding", PARALLEL_EMBEDDING})
CONVOLUTION = frozenset({"graphpatch.rewrites.lora_convolution:LoraConvolution"})
TRANSPOSED_CONVOLUTION = frozenset({"graphpatch.rewrites.lora_transposed:LoraTransposedConvolution"})
ATTENTION = frozenset({FUSED, SEPARATE})
"""Rewrites, by import path: an option has an effect where the rewrite knows it."""

DORA = (LINEAR | PARALLEL | EMBEDDING | CONVOLUTION) - {PARALLEL_EMBEDDING, *ENGINE.values()}
BIAS = (LINEAR | PARALLEL | CONVOLUTION | TRANSPOSED_CONVOLUTION) - set(ENGINE.values())
OF_ANY = frozenset({"kaiming", "gaussian"})
"""The values of `init` that ask nothing of the target; the others are for one matrix."""
DIVIDE = frozenset({"pissa", "olora", "loftq"})
"""The values of `init` that give B A a value, which the scale multiplies."""
OF_THE_WEIGHT = frozenset({"pissa", "olora"})
"""The values of `init` that take a part out of the weight, so that what they started from must be remembered."""


TIED = frozenset({"graphpatch.rewrites.lora:LoraLinear", "graphpatch.rewrites.lora_embedding:LoraEmbedding"})
"""Of a weight stored (vocabulary, dim)."""


def check_options(lora: Lora, target: Target, rewrite: str) -> None:
    """Raise `Refusal` for the first option that is without effect where `rewrite` does the work."""
    cls = target.signature.cls
    if rewrite in ATTENTION and lora.dropout:
        raise _no_effect("dropout", cls, "it is given weights, and no input passes the factors", "dropout")
    if rewrite in ATTENTION and lora.layout:
        raise _no_effect("layout", cls, "its parts are known: q, k, v, out", "layout")
    if lora.parts and rewrite not in LINEAR | PARALLEL | ATTENTION:
        raise _no_effect("parts", cls, "it is no linear made of several", "parts")
    if lora.dora and rewrite not in DORA:
        raise _no_effect("dora=true", cls, "LoRA has no rows of one weight to scale there", "dora")
    if lora.bias and rewrite not in BIAS:
        raise _no_effect("bias=true", cls, "LoRA adds to no bias there", "bias")
    if lora.init != "kaiming" and rewrite in EMBEDDING:
        raise _no_effect("init", cls, "lora_A starts at zero there, and lora_B is random", "init")
    if lora.init not in OF_ANY and rewrite not in LINEAR:
        raise _no_effect(f'init="{lora.init}"', cls, "it is made for the one weight of a linear", "init")
    if lora.init not in OF_ANY and lora.init != "orthogonal":
        (_, in_), (out, _) = (shape[:2] for shape in factor_shapes(target.signature, lora.rank))
        most, of = (in_, f"{in_} features") if lora.init == "eva" else (min(in_, out), f"a weight of {out} x {in_}")
        if lora.rank > most:
            raise Refusal(
                f'init="{lora.init}" finds at most {most} directions in {of}, and the rank is {lora.rank}',
                f"lora(rank={most}), or another init",
            )


def _no_effect(argument: str, cls: str, why: str, without: str) -> Refusal:
    return Refusal(
        f"`{argument}` has no effect on {cls}: {why}", f"give those targets a rule of their own, without {without}"
    )
