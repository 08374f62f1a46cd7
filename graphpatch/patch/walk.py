"""Visit every module of a model, and put another in its place if the visitor says so."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from ..lang.diagnostics import ApplyError, Diagnostic


def walk(model: nn.Module, fn: Callable[..., Any]) -> nn.Module:
    """Call `fn` on every module, parents first, each once however many names it has; return the model.

    `fn` gets the module, and of `name` (the last segment of its path), `prefix` (the path of its parent), `path` and
    `index` (the name as an int, where it is one, else None) those that it has parameters for. If it returns a module,
    that takes the place of the one it was given, at every place of it; if it returns None, the module stays. All calls
    are made before anything is put anywhere: `fn` sees the model as it was, is not called on what it made, and if it
    raises, nothing was replaced. Containers, hooks and all that is not replaced stay the objects they are. A replaced
    root is returned.

    Raises `ApplyError` (GP518) where `fn` returns something else.
    """
    wanted = _wanted(fn)
    replaced: dict[nn.Module, nn.Module] = {}
    places: list[tuple[nn.Module, str, nn.Module]] = []
    seen: set[nn.Module] = set()
    stack: list[tuple[nn.Module, str, str]] = [(model, "", "")]
    while stack:
        module, prefix, name = stack.pop()
        if module in seen:
            continue
        seen.add(module)
        path = f"{prefix}.{name}" if prefix else name
        facts = {"name": name, "prefix": prefix, "path": path, "index": int(name) if name.isdecimal() else None}
        # Before the call, since `fn` may change the module it is given.
        children = [(key, child) for key, child in module._modules.items() if child is not None]
        answer = fn(module, **{key: value for key, value in facts.items() if key in wanted})
        if answer is not None and not isinstance(answer, nn.Module):
            raise ApplyError(
                Diagnostic(
                    "GP518",
                    f"the function given to walk returned {type(answer).__name__} for `{path or '^'}`",
                    fixes=("return a torch.nn.Module to replace it, or None to leave it",),
                )
            )
        if answer is not None and answer is not module:
            replaced[module] = answer
        places += [(module, key, child) for key, child in children]
        stack += [(child, path, key) for key, child in reversed(children)]
    for parent, key, child in places:
        if child in replaced:
            parent._modules[key] = replaced[child]
    return replaced.get(model, model)


def _wanted(fn: Callable[..., Any]) -> set[str]:
    known = {"name", "prefix", "path", "index"}
    try:
        parameters = inspect.signature(fn).parameters
    except (TypeError, ValueError):  # a builtin does not tell
        return set()
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return known
    # The first takes the module, whatever it is called.
    return known.intersection(list(parameters)[1:])
