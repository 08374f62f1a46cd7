"""The last hidden states of a model that goes on to its own head.

Not by `output_hidden_states`: for that Transformers leaves hooks on the model, which no pickle takes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, NamedTuple, cast

from torch import Tensor, nn

from ..lang.diagnostics import ApplyError, Diagnostic
from .head_transformers import OnTransformers, body_of
from .rewrite import InPlace


class Keep(NamedTuple):
    name: str
    """Of the attribute under which the states lie until they are fetched."""


class Keeping(InPlace):
    """On a model's body: what it puts out lies on it until the model above has fetched it."""

    level: ClassVar[int] = 30
    entries: ClassVar[str] = "_keeping"
    _keeping: tuple[Keep, ...] = ()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        for keep in self._keeping:
            if hasattr(self, keep.name):  # the model above asked: called by itself, the body keeps nothing
                setattr(self, keep.name, output[0])
        return output


class WithStates(OnTransformers):
    """Runs the model as it is, and has its last hidden states too."""

    @classmethod
    def companions(cls, entry: Any, module: nn.Module) -> Iterable[tuple[nn.Module, type[InPlace], Any]]:
        keep = Keep(f"{cls.entries}_states")
        return [(body, Keeping, keep) for body in _bodies(module)]

    def with_states(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Tensor, bool]:
        """The output, the last hidden states (B x S x H), and whether the caller wants a tuple."""
        given = self.named(args, kwargs)
        said = given.pop("return_dict", None)
        as_tuple = said is False or (said is None and cast(Any, self.config).return_dict is False)
        bodies, name = _bodies(self), f"{self.entries}_states"
        for body in bodies:
            setattr(body, name, None)
        try:
            output = super().forward(**given, return_dict=True)
            kept = [getattr(body, name) for body in bodies]
        finally:
            for body in bodies:
                body.__dict__.pop(name, None)
        states = output.last_hidden_state if not bodies else next((one for one in kept if one is not None), None)
        if states is None:
            raise _uncalled(self, bodies)
        return output, states, as_tuple


def _bodies(model: nn.Module) -> list[nn.Module]:
    """What puts out the last hidden states: the model's body, and the decoder in it where that is the one model there,
    which OPT calls past its body. None for a bare encoder."""
    body = body_of(model)
    if body is model:
        return []
    inner = [child for child in body.children() if hasattr(child, "base_model")]
    return [body, *inner] if len(inner) == 1 else [body]


def _uncalled(model: nn.Module, bodies: list[nn.Module]) -> ApplyError:
    names = " or ".join(type(body).__name__ for body in bodies)
    return ApplyError(
        Diagnostic(
            "GP576",
            f"{type(model).__name__} did not call its {names}, so its last hidden states are not known",
            fixes=("put the head on the body by itself: apply the rules to model.base_model",),
        )
    )
