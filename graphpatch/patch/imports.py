"""Importing what a plan names: rewrites, from an op's table, and classes that a rule names, by permission."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from importlib import import_module
from typing import Any

from ..lang.diagnostics import ApplyError, Diagnostic


def load_rewrite(path: str, rule: str) -> Any:
    """The object at `package.module:name`. Raises `ApplyError` (GP515)."""
    module, _, name = path.partition(":")
    try:
        return getattr(import_module(module), name)
    except Exception as error:
        raise ApplyError(
            Diagnostic("GP515", f"the rewrite {path} cannot be loaded", text=(rule, brief(error)))
        ) from error


def load_permitted(path: str, allowed: Sequence[str], rule: str) -> Any:
    """The object at `package.module.Name`, imported only if a pattern of `allowed` fits (GP505 else).

    `mypkg.*` fits all below mypkg. Raises `ApplyError` (GP506) where nothing is found there.
    """
    if not any(fnmatchcase(path, pattern) for pattern in allowed):
        package = path.partition(".")[0]
        raise ApplyError(
            Diagnostic(
                "GP505",
                f"{rule} wants to import {path}, and nothing permits that",
                text=("importing runs code; a rule file alone must not",),
                fixes=(
                    f'if you trust it: apply(model, rules, allow_import=["{package}.*"]), '
                    f"or --allow-import '{package}.*' on the command line",
                ),
            )
        )
    module, _, name = path.rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except Exception as error:
        raise ApplyError(Diagnostic("GP506", f"{path} cannot be imported", text=(rule, brief(error)))) from error
    if not callable(found):
        raise ApplyError(Diagnostic("GP506", f"{path} is no class", text=(rule, f"it is {type(found).__name__}")))
    return found


def brief(error: BaseException) -> str:
    """An exception in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
