"""`activation`: on an activation's own module, and on a module that holds it as a plain function."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..lang.diagnostics import ApplyError, Diagnostic
from ..ops.activation import ATTRIBUTES, Activation
from ..ops.op import Op
from .rewrite import Attributes, InPlace


def _gelu_new(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _relu2(x: Tensor) -> Tensor:
    return torch.square(F.relu(x))


def _linear(x: Tensor) -> Tensor:
    return x


_tanh = partial(F.gelu, approximate="tanh")
FUNCTIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu, "gelu_tanh": _tanh, "gelu_pytorch_tanh": _tanh, "gelu_new": _gelu_new, "quick_gelu": _quick_gelu,
    "silu": F.silu, "swish": F.silu, "relu": F.relu, "relu2": _relu2, "leaky_relu": F.leaky_relu, "mish": F.mish,
    "tanh": torch.tanh, "sigmoid": torch.sigmoid, "linear": _linear,
}  # fmt: skip


class Named(NamedTuple):
    kind: str
    text: str


class ActivationModule(InPlace):
    """Computes another function."""

    level: ClassVar[int] = Activation.level
    entries: ClassVar[str] = "_activation_kind"
    _activation_kind: tuple[Named, ...] = ()

    @classmethod
    def entry(cls, op: Op, parameter: str | None = None) -> Named:
        return Named(cast(Activation, op).kind, op.text())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self._activation_kind:
            return super().forward(*args, **kwargs)
        return FUNCTIONS[self._activation_kind[-1].kind](*args, **kwargs)


class ActivationAttribute(Attributes):
    """Another function in the attribute that holds it."""

    @staticmethod
    def values(op: Op, module: nn.Module) -> Mapping[str, Any]:
        kind = cast(Activation, op).kind
        inside = next((name for name in ATTRIBUTES if name in module._modules), None)
        if inside is not None:
            raise _no_activation(module, f"it is a module, `{inside}`", f"target that: the selector, and `.{inside}`")
        held = [name for name in ATTRIBUTES if callable(module.__dict__.get(name))]
        if not held:
            raise _no_activation(
                module, f"none of its attributes is one ({', '.join(ATTRIBUTES)})", "target the activation's own module"
            )
        values: dict[str, Any] = dict.fromkeys(held, FUNCTIONS[kind])
        if "activation_relu_or_gelu" in module.__dict__:  # what nn.TransformerEncoderLayer's fused path computes by
            values["activation_relu_or_gelu"] = {"relu": 1, "gelu": 2}.get(kind, 0)
        return values


def _no_activation(module: nn.Module, why: str, fix: str) -> ApplyError:
    title = f"{type(module).__name__} holds no activation as a function: {why}"
    return ApplyError(Diagnostic("GP563", title, fixes=(fix,)))
