"""The in-place mechanism: a module's class becomes a cached subclass that has the mixins in front of the base.

Flat, `(Softcap, Lora, Linear)` and never nested, with the mixins sorted by level: so the order in which patches come
and go does not matter. The base's name stays, and with it what print, fx and `architectures` show.
"""

from __future__ import annotations

import copyreg
import types
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from ..rewrites.rewrite import InPlace

Mixins = tuple[type[InPlace], ...]
"""From the innermost to the outermost."""

_classes: dict[tuple[type, Mixins], type] = {}


def subclass(base: type, mixins: Iterable[type[InPlace]]) -> type:
    """The class that has these mixins in front of `base`; the same one for the same mixins in any order."""
    ordered: Mixins = tuple(sorted(set(mixins), key=lambda m: (m.level, m.__module__, m.__qualname__)))
    if not ordered:
        return base
    found = _classes.get((base, ordered))
    if found is None:
        found = _classes[base, ordered] = _make(base, ordered)
    return found


def _make(base: type, mixins: Mixins) -> type:
    chosen: list[type] = []
    for mixin in mixins:
        chosen.append(mixin.variant(chosen[-1] if chosen else base))
    namespace = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": _reduce_ex,
        "_graphpatch_base": base,
        "_graphpatch_mixins": mixins,
    }
    made: Any = types.new_class(base.__name__, (*reversed(chosen), base), {}, lambda ns: ns.update(namespace))
    # Also where the base has none yet: generated classes are kept, and the base may be given one.
    if made.forward is not getattr(base, "forward", None):
        made.kernel_layer_name = _Absent()
    return made  # type: ignore[no-any-return]


class _Absent:
    """`kernel_layer_name`, by which the kernels hub finds the layers that it may give another forward, on the instance:
    one that would be called past the mixins."""

    def __get__(self, module: Any, owner: type) -> Any:
        raise AttributeError("kernel_layer_name")


def _reduce_ex(self: Any, protocol: Any) -> Any:
    """As the base reduces, but through `rebuild`: the generated class bears the base's name, so pickle by name would
    find the base and lose the mixins."""
    cls = _generated(type(self))
    assert cls is not None
    base, mixins = cls._graphpatch_base, cls._graphpatch_mixins
    reduced = base.__reduce_ex__(self, protocol)
    if isinstance(reduced, str):
        return reduced
    make, args = reduced[0], tuple(base if a is cls else a for a in reduced[1])
    if make is cls:
        make = base
    elif make is copyreg.__newobj__:  # type: ignore[attr-defined]
        args = (base, *args[1:])
    return (rebuild, (base, mixins, make, args), *reduced[2:])


def rebuild(base: type, mixins: Mixins, make: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Unpickle: construct as the base does, then put the mixins in front again."""
    module = make(*args)
    object.__setattr__(module, "__class__", subclass(base, mixins))
    return module


def _generated(cls: type) -> Any:
    """The nearest class in the MRO that `subclass` made."""
    return next((c for c in cls.__mro__ if "_graphpatch_base" in c.__dict__), None)


def is_foreign(module: nn.Module) -> bool:
    """Whether somebody else derived from a class that we generated, as `fully_shard` does."""
    cls = type(module)
    if "_graphpatch_base" not in cls.__dict__ and is_parametrized(module):
        cls = cls.__bases__[0]
    made = _generated(cls)
    return made is not None and made is not cls


def class_with(module: nn.Module, edit: Callable[[Mixins], Iterable[type[InPlace]]]) -> type:
    """The class `module` has after its mixins were edited; for a parametrised module, a copy of its own over that.

    `torch.nn.utils.parametrize` gives each module a class of its own, `ParametrizedLinear(Linear)`, and later takes
    its first base to go back: so the mixins go beneath it.
    """
    cls = type(module)
    if "_graphpatch_base" not in cls.__dict__ and is_parametrized(module):
        below = cls.__bases__[0]
        edited = _edited(below, edit)
        if edited is below:
            return cls
        over: Any = cls.__dict__.get("_graphpatch_over")
        same = over is not None and over.__bases__[0] is edited and _properties(over) == _properties(cls)
        return over if same else _copied(cls, edited)
    return _edited(cls, edit)


def _edited(cls: Any, edit: Callable[[Mixins], Iterable[type[InPlace]]]) -> type:
    ours = "_graphpatch_base" in cls.__dict__
    base, mixins = (cls._graphpatch_base, cls._graphpatch_mixins) if ours else (cls, ())
    return subclass(base, edit(mixins))


def _copied(cls: type, below: type) -> type:
    namespace = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
    # So that going back finds the very class that was there.
    namespace.setdefault("_graphpatch_over", cls)
    return types.new_class(cls.__name__, (below,), {}, lambda ns: ns.update(namespace))


def _properties(cls: type) -> set[str]:
    return {name for name, value in vars(cls).items() if isinstance(value, property)}


def set_class(module: nn.Module, cls: type) -> None:
    """Change the class, and what the instance holds of the old one's `forward`.

    accelerate keeps the bound method in `_old_forward`, and leaves it as `forward` when its hooks are gone; kept as it
    is, it would go on calling the old class's forward.
    """
    old, entries = type(module), module.__dict__
    held: tuple[str, ...] = ()
    if "forward" in entries or "_old_forward" in entries:
        held = tuple(name for name in _HELD if _is_forward_of(module, entries.get(name), old))
    # Past nn.Module's own __setattr__, which is slow, and past an overridden one, which may do anything.
    object.__setattr__(module, "__class__", cls)
    for name in held:
        module.__dict__[name] = types.MethodType(cls.forward, module)  # type: ignore[attr-defined]


_HELD = ("forward", "_old_forward")


def _is_forward_of(module: nn.Module, value: Any, cls: type) -> bool:
    return (
        isinstance(value, types.MethodType) and value.__self__ is module and value.__func__ is cls.forward  # type: ignore[attr-defined]
    )


def bypassed(module: nn.Module) -> str | None:
    """What stands on the instance in front of its class's `forward` and would not be changed by `set_class`; None where
    nothing does."""
    entries = module.__dict__
    if "forward" not in entries or _is_forward_of(module, entries["forward"], type(module)):
        return None
    if "_hf_hook" in entries and _is_forward_of(module, entries.get("_old_forward"), type(module)):
        return None
    function = getattr(entries["forward"], "func", entries["forward"])
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', type(function).__name__)}"
