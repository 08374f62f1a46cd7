"""`package.module:callable`: a model that the user's own code builds. It is imported because the user named it."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from ..lang.diagnostics import did_you_mean
from ..tree.tree import Tree
from .huggingface import quiet
from .problem import CannotRun, first_line
from .terminal import progress


def build_named(name: str) -> Tree:
    """The tree of what the callable returns, or of the model or tree that stands there itself.

    Raises `CannotRun` (GP707).
    """
    module_name, _, attribute = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    with quiet():
        with progress(f"importing {module_name}"):
            found = _find(module_name, attribute)
        with progress(f"building {name}"):
            return _tree_of(name, found)


def _find(module_name: str, attribute: str) -> Any:
    try:
        found: Any = import_module(module_name)
    except (Exception, SystemExit) as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name and module_name.startswith(error.name)
        fix = "the current directory and the installed packages were searched" if missing else ""
        raise CannotRun("GP707", f"{module_name} cannot be imported", fix, text=(first_line(error),)) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise CannotRun("GP707", f"{module_name} has no `{attribute}`", did_you_mean(part, dir(found)))
        found = getattr(found, part)
    return found


def _tree_of(name: str, found: Any) -> Tree:
    import torch

    model = found
    if not isinstance(found, (torch.nn.Module, Tree)):
        if not callable(found):
            what = type(found).__name__
            raise CannotRun("GP707", f"{name} is a {what}, and no function that builds a model")
        try:
            model = found()
        except (Exception, SystemExit) as error:
            raise CannotRun(
                "GP707", f"{name}() raised", "it is called without arguments", text=(first_line(error),)
            ) from error
    if isinstance(model, Tree):
        return model
    if not isinstance(model, torch.nn.Module):
        raise CannotRun("GP707", f"{name}() gave a {type(model).__name__}, and no torch.nn.Module")
    return Tree.of(model)
