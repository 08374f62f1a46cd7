"""The last hidden states of a model that goes on to its own head.

Not by `output_hidden_states`: for that Transformers leaves hooks on the model, which no pickle takes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, NamedTuple, cast

from torch import Tensor, nn

from .head_transformers import OnTransformers
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
        body = cast(nn.Module, module.base_model)
        return [] if body is module else [(body, Keeping, Keep(f"{cls.entries}_states"))]

    def with_states(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Tensor, bool]:
        """The output, the last hidden states (B x S x H), and whether the caller wants a tuple."""
        given = self.named(args, kwargs)
        said = given.pop("return_dict", None)
        as_tuple = said is False or (said is None and cast(Any, self.config).return_dict is False)
        body, name = cast(nn.Module, self.base_model), f"{self.entries}_states"
        if body is not self:
            setattr(body, name, None)
        try:
            output = super().forward(**given, return_dict=True)
            states = output.last_hidden_state if body is self else getattr(body, name)
        finally:
            if name in body.__dict__:
                delattr(body, name)
        return output, states, as_tuple
