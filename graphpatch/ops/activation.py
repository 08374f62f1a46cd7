"""Another activation function."""

from __future__ import annotations

from typing import ClassVar, Literal

from .calls import refuse_uncalled
from .op import Op, Refusal, Target
from .registry import register

Function = Literal[
    "gelu", "gelu_tanh", "gelu_pytorch_tanh", "gelu_new", "quick_gelu", "silu", "swish", "relu", "relu2", "leaky_relu",
    "mish", "tanh", "sigmoid", "linear",
]  # fmt: skip


@register("activation")
class Activation(Op):
    """Another activation function, in the place of the one that is there.

    The target is the activation's own module (`mlp.act_fn`), or a module that holds its activation as a plain function
    (`nn.TransformerEncoderLayer`, the `act`, `act_fn`, `activation_fn` or `intermediate_act_fn` of many models). The
    names are Transformers' (`ACT2FN`) and compute the same, bit for bit: `gelu` is x * Phi(x) (Hendrycks and Gimpel,
    arXiv:1606.08415), `gelu_tanh`, which Transformers calls `gelu_pytorch_tanh`, its approximation by tanh, `relu2`
    the square of relu (arXiv:2109.08668), `quick_gelu` x * sigmoid(1.702 x), `linear` none.
    """

    accepts: ClassVar = {
        "megatron.core.transformer.mlp.MLP": "graphpatch.megatron.activation:MegatronActivation",
        "*": "graphpatch.rewrites.activation:ActivationAttribute",
    }
    level: ClassVar[int] = 0

    kind: Function

    def through(self, target: Target, row: str) -> str:
        return "graphpatch.rewrites.activation:ActivationModule" if is_activation(target) else row

    def check(self, target: Target) -> None:
        refuse_uncalled(target, self.op)
        if is_activation(target) and target.signature.parameters:
            names = ", ".join(target.signature.parameters)
            raise Refusal(f"{target.signature.cls} has parameters ({names}), which would be left without effect")

    def after(self, target: Target) -> str:
        return self.kind if is_activation(target) else f"{target.signature.cls} ({self.kind})"


def is_activation(target: Target) -> bool:
    """Whether the target is an activation function itself."""
    name = target.path.rpartition(".")[2]
    of_torch = any(cls.startswith("torch.nn.modules.activation.") for cls in target.signature.mro)
    if of_torch:
        return target.signature.cls != "MultiheadAttention"
    of_library = any(cls.startswith("transformers.activations.") for cls in target.signature.mro)
    return of_library or "activation" in target.signature.cls.lower() or name in ATTRIBUTES


ATTRIBUTES = ("act_fn", "activation_fn", "activation", "act", "intermediate_act_fn", "hidden_act", "activation_func")
"""What the activation of a module is called."""
