"""Ops by name: built in, registered by decorator, or offered by an installed package as an entry point."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import import_module
from typing import TypeVar

from .op import Op

_BUILT_IN = {
    "activation": "graphpatch.ops.activation",
    "adapter.bottleneck": "graphpatch.ops.bottleneck",
    "attention.causal": "graphpatch.ops.attention_window",
    "attention.scale": "graphpatch.ops.attention_scale",
    "attention.window": "graphpatch.ops.attention_window",
    "bias.drop": "graphpatch.ops.bias_drop",
    "cast": "graphpatch.ops.cast",
    "checkpoint": "graphpatch.ops.checkpoint",
    "compile": "graphpatch.ops.compile",
    "dropout": "graphpatch.ops.dropout",
    "embedding.extend": "graphpatch.ops.embedding_resize",
    "embedding.resize": "graphpatch.ops.embedding_resize",
    "head.classify": "graphpatch.ops.head_classify",
    "head.embed": "graphpatch.ops.head_beside",
    "head.medusa": "graphpatch.ops.head_medusa",
    "head.regress": "graphpatch.ops.head_classify",
    "head.reward": "graphpatch.ops.head_classify",
    "head.token_classify": "graphpatch.ops.head_classify",
    "head.value": "graphpatch.ops.head_beside",
    "insert_before": "graphpatch.ops.insert",
    "layers.drop": "graphpatch.ops.layers_drop",
    "layers.repeat": "graphpatch.ops.layers_repeat",
    "lora": "graphpatch.ops.lora",
    "norm.post": "graphpatch.ops.norm_post",
    "norm.replace": "graphpatch.ops.norm_replace",
    "qk_norm": "graphpatch.ops.qk_norm",
    "quantize.int4": "graphpatch.ops.quantize",
    "quantize.int8": "graphpatch.ops.quantize",
    "quantize.nf4": "graphpatch.ops.quantize",
    "replace": "graphpatch.ops.replace",
    "rope.scale": "graphpatch.ops.rope_scale",
    "scale.output": "graphpatch.ops.scale",
    "set": "graphpatch.ops.set",
    "softcap.attention": "graphpatch.ops.softcap_attention",
    "softcap.output": "graphpatch.ops.softcap_output",
    "tap": "graphpatch.ops.tap",
    "wrap": "graphpatch.ops.wrap",
}
"""Where each op stands; imported when a rule first names it."""
_GROUP = "graphpatch.ops"

_registered: dict[str, type[Op]] = {}
_OpClass = TypeVar("_OpClass", bound=type[Op])


def register(name: str) -> Callable[[_OpClass], _OpClass]:
    """Make a subclass of `Op` known to rules under `name`.

    >>> @register("mypkg.noise")
    ... class Noise(Op):
    ...     std: float

    Raises `ValueError` for a name that a rule could not write, or that another op has.
    """
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", name):
        raise ValueError(f"{name!r} cannot name an op: a rule writes names and dots, `scale.output`")

    def enter(cls: _OpClass) -> _OpClass:
        taken = _registered.get(name)
        built_in = _BUILT_IN.get(name)
        # The same definition again (a reloaded module, a re-run notebook cell) is no clash.
        if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"the op `{name}` is {taken.__module__}.{taken.__qualname__} already")
        if taken is None and built_in is not None and cls.__module__ != built_in:
            raise ValueError(f"the op `{name}` is built in ({built_in}) already")
        cls.op = name
        _registered[name] = cls
        return cls

    return enter


def find(name: str) -> type[Op] | None:
    """The op of that name, None where nobody has one.

    A built-in op's file is imported here, or, for an unknown name, the one entry point that bears it; nothing else.
    Raises `ImportError` where an entry point of that name does not lead to an op.
    """
    if name not in _registered and name in _BUILT_IN:
        import_module(_BUILT_IN[name])
    if name not in _registered:
        for point in _entry_points():
            if point.name == name:
                loaded = point.load()
                if not (isinstance(loaded, type) and issubclass(loaded, Op)):
                    raise ImportError(
                        f"the entry point {point.value!r} of the op `{name}` is not a subclass of graphpatch's Op"
                    )
                register(name)(loaded)
    return _registered.get(name)


def names() -> list[str]:
    """Every op that `find` would find, sorted; imports none of them."""
    return sorted({*_BUILT_IN, *_registered, *(point.name for point in _entry_points())})


def accept(op: str, cls: str, rewrite: str) -> None:
    """Teach an op another class: a row in its table, from a qualified class name to the import path of a rewrite.

    >>> accept("lora", "mypkg.nn.FastLinear", "mypkg.patches:LoraFastLinear")

    Raises `KeyError` for an unknown op, `ValueError` for a rewrite that is not written `module:name`.
    """
    found = find(op)
    if found is None:
        raise KeyError(f"no op is called {op!r}")
    if not re.fullmatch(r"[\w.]+:\w+", rewrite):
        raise ValueError(f"{rewrite!r}: an import path is written `package.module:ClassName`")
    found.accepts = {**found.accepts, cls: rewrite}


def _entry_points() -> list:
    # 30 ms that only an unknown name, or a listing, has to pay.
    from importlib.metadata import entry_points

    return list(entry_points(group=_GROUP))
