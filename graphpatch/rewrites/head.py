"""What mixins share that put a head on a whole model: its inputs by name, its body, its new layers."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from ..lang.diagnostics import ApplyError, Diagnostic
from ..ops.op import Refusal
from .rewrite import InPlace


class OnModel(InPlace):
    """On a model: `forward` keeps the signature of the model's own, by which a Trainer finds what a batch may hold."""

    _positional: ClassVar[tuple[str, ...]] = ()
    """The names of the model's arguments, in their order."""
    takes: ClassVar[tuple[str, ...]] = ()
    """Arguments that the mixin's forward takes beyond those."""

    @classmethod
    def variant(cls, below: Any) -> type[InPlace]:
        signature = inspect.signature(below.forward)
        parameters = list(signature.parameters.values())
        names = tuple(p.name for p in parameters[1:] if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))
        new = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
            for name in cls.takes
            if name not in signature.parameters
        ]
        at = next((i for i, p in enumerate(parameters) if p.kind is p.VAR_KEYWORD), len(parameters))
        known = signature.replace(parameters=[*parameters[:at], *new, *parameters[at:]])

        class Made(cls):  # type: ignore[misc, valid-type]
            _positional = names

            def forward(self, *args: Any, **kwargs: Any) -> Any:
                return super().forward(*args, **kwargs)

        Made.forward.__signature__ = known  # type: ignore[attr-defined]
        Made.__name__, Made.__qualname__, Made.__module__ = cls.__name__, cls.__qualname__, cls.__module__
        return Made

    def named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a call, all by name."""
        return {**dict(zip(self._positional, args)), **kwargs}


def check_output_layer(module: nn.Module, at: str | None) -> None:
    """Raise `Refusal` (GP570) where what stands at `at` is not the output layer of a model of Transformers, or where
    that carries an op, which would have no effect any more."""
    own = module.get_output_embeddings()  # type: ignore[operator]
    if at is not None and own is not layer_at(module, at):
        named = next((name for name, child in module.named_modules() if child is own), "none")
        raise Refusal(
            f"`{at}` is not the output layer of {type(module).__name__}, which is {named}",
            "target the model, `^`, instead of a layer",
            code="GP570",
        )
    if own is not None and hasattr(type(own), "_graphpatch_mixins"):
        raise Refusal(
            f"the output layer, {type(own).__name__}, was patched before, and would not be called any more",
            "revert that patch first",
            code="GP570",
        )


def layer_at(module: nn.Module, at: str) -> nn.Module:
    try:
        return module.get_submodule(at)
    except AttributeError:
        raise Refusal(f"{type(module).__name__} has no `{at}`", code="GP570") from None


def fill_linear(module: nn.Module, tensors: Mapping[str, Tensor], name: str, init: str) -> None:
    """As Transformers initialises a new head: normal, of the config's `initializer_range`; a bias is zero."""
    weight, bias = tensors[f"{name}.weight"], tensors.get(f"{name}.bias")
    if init == "zeros":
        weight.zero_()
    else:
        config = getattr(module, "config", None)
        std = getattr(config, "initializer_range", None)
        weight.normal_(std=std if isinstance(std, float) else 0.02)
    if bias is not None:
        bias.zero_()


def no_generation(model: nn.Module, op: str) -> ApplyError:
    return ApplyError(
        Diagnostic(
            "GP572",
            f"{type(model).__name__} has no language-model head to generate with: {op} stands in its place",
            fixes=("within patch.disabled(), or after patch.revert(), it generates as before",),
        )
    )
