"""`insert_before` on any module."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Any, ClassVar, NamedTuple, cast

from torch import Tensor, nn

from ..lang.diagnostics import ApplyError, Diagnostic
from ..ops.insert import InsertBefore
from ..ops.op import Op, Refusal
from .rewrite import InPlace


class Preceding(NamedTuple):
    child: str
    level: int
    op: str
    mixin: type[InPlace]
    entry: Any
    text: str


class Before(nn.Identity):
    """The identity before a module's input; it carries the op that is inserted."""

    def __init__(self, argument: str | None):
        super().__init__()
        self.argument = argument
        """The name of the argument that is the module's input."""


class Preceded(InPlace):
    """Changes the first argument before the module, and all that is on it, sees that."""

    level: ClassVar[int] = InsertBefore.level
    entries: ClassVar[str] = "_preceded"
    _preceded: tuple[Preceding, ...] = ()

    @classmethod
    def entry(cls, op: Op, parameter: str | None = None) -> Preceding:
        before = cast(InsertBefore, op)
        path, _, name = before.rewrite.partition(":")
        mixin = cast("type[InPlace]", getattr(import_module(path), name))
        entry = mixin.entry(before.inner)
        return Preceding(before.child, before.inner.level, before.inner.op, mixin, entry, before.text())

    @classmethod
    def check(cls, entry: Preceding, module: nn.Module) -> None:
        if _first_argument(module) is None:
            raise Refusal(f"the forward of {type(module).__name__} takes no input", code="GP483")

    @classmethod
    def submodules(cls, entry: Preceding, module: nn.Module) -> Mapping[str, nn.Module]:
        before = Before(_first_argument(module))
        for name, child in entry.mixin.submodules(entry.entry, before).items():
            before.add_module(name, child)
        return {entry.child: before}

    @classmethod
    def initialise(cls, entry: Preceding, tensors: Mapping[str, Tensor], module: nn.Module) -> None:
        own = {name.removeprefix(f"{entry.child}."): tensor for name, tensor in tensors.items()}
        entry.mixin.initialise(entry.entry, own, module.get_submodule(entry.child))

    @classmethod
    def companions(cls, entry: Preceding, module: nn.Module) -> Iterable[tuple[nn.Module, type[InPlace], Any]]:
        yield module.get_submodule(entry.child), entry.mixin, entry.entry

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        for entry in sorted(self._preceded, key=lambda one: one.level):
            before = getattr(self, entry.child)
            given = args[0] if args else kwargs.get(before.argument)
            if not isinstance(given, Tensor) or not given.is_floating_point():
                raise _no_input(self, entry, before, given)
            changed = before(given)
            args = tuple(changed if one is given else one for one in args)
            kwargs = {name: changed if one is given else one for name, one in kwargs.items()}
        return super().forward(*args, **kwargs)


def _first_argument(module: nn.Module) -> str | None:
    """The name of the first argument of the forward that the module's class had; `*args` has that of its own."""
    forward = getattr(type(module), "_graphpatch_base", type(module)).forward
    names = [p.name for p in inspect.signature(forward).parameters.values() if p.kind is not p.VAR_KEYWORD]
    return names[1] if len(names) > 1 else None


def _no_input(module: nn.Module, entry: Preceding, before: Before, given: Any) -> ApplyError:
    cls = type(module).__name__
    is_given = "nothing" if given is None else type(given).__name__
    if isinstance(given, Tensor):
        is_given = f"a tensor of {str(given.dtype).removeprefix('torch.')}"
    return ApplyError(
        Diagnostic(
            "GP484",
            f"{entry.op} before the input of {cls} needs a floating-point tensor as `{before.argument}`",
            text=(f"{cls} was called with {is_given}",),
            fixes=("target a module further in, which is given hidden states",),
        )
    )
