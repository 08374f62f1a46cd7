"""Which modules a config means: PEFT's matching, name by name, as its `check_target_module_exists` has it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from ...lang.diagnostics import Diagnostic, Error
from ...lang.regex import problem
from .config import LoraConfig

_Value = TypeVar("_Value")

FIRST_INDEX = r".*?\.[^.]*\.(\d+)\."
"""Where no layers_pattern is given, the first number in a name counts, unless it stands at its very beginning."""


def targets(config: LoraConfig, names: Iterable[str]) -> list[str]:
    """Those of the names (of modules, each once, without the root's) that get an adapter.

    `target_modules` must be given, and no `all-linear`: those need the model and not its names alone.
    """
    return [name for name in names if name and not is_excluded(config, name) and _is_target(config, name)]


def parameter_targets(config: LoraConfig, names: Iterable[str]) -> list[str]:
    """Those of the names of parameters that get an adapter: by themselves or by a dotted end, and no more to it."""
    given = config.target_parameters or []
    return [name for name in names if named_by(given, name)]


def value_of(patterns: Mapping[str, _Value], name: str, default: _Value) -> _Value:
    """What `rank_pattern` or `alpha_pattern` says of a name: the first that matches counts."""
    return next((v for key, v in patterns.items() if re.match(rf"(.*\.)?({safe(key)})$", name)), default)


def is_excluded(config: LoraConfig, name: str) -> bool:
    given = config.exclude_modules
    if given and (re.fullmatch(safe(given), name) if isinstance(given, str) else named_by(given, name)):
        return True
    return any(re.match(rf"(^|.*\.){safe(key)}($|\..*)", name) for key in config.modules_to_save or [])


def saved_modules(config: LoraConfig, names: Iterable[str]) -> list[str]:
    """Those of the names that `modules_to_save` reaches: by the letters of their end, be there a dot or not."""
    given = tuple(config.modules_to_save or ())
    return [name for name in names if name and given and name.endswith(given)]


def named_by(given: Sequence[str], name: str) -> bool:
    """By the whole name, or by an end of it that begins behind a dot."""
    return name in given or any(name.endswith(f".{end}") for end in given)


def _is_target(config: LoraConfig, name: str) -> bool:
    given = config.target_modules
    if given is None:
        return False
    if isinstance(given, str):
        return re.fullmatch(safe(given), name) is not None
    if name in given:
        return True  # and no layer is asked for then
    return named_by(given, name) and (config.layers is None or layer_of(config, name) in config.layers)


def layer_of(config: LoraConfig, name: str) -> int | None:
    """The index that `layers_to_transform` is held against."""
    found = None
    if not config.patterns:
        found = re.match(FIRST_INDEX, name)
    for pattern in config.patterns:
        found = re.match(rf"(?:^|.*?\.){safe(pattern)}\.(?P<idx>\d+)\.", name)
        if found:
            break
    return int(found["idx"] if "idx" in found.groupdict() else found[1]) if found else None


def safe(pattern: str) -> str:
    """The pattern; raises `Error` (GP627) where it does not compile, or could run without end."""
    found = problem(pattern)
    if found:
        raise Error(
            Diagnostic(
                "GP627",
                "a regular expression of the config cannot be used",
                text=(pattern[:200] + ("..." if len(pattern) > 200 else ""), found),
                fixes=("give target_modules as a list of names",),
            )
        )
    return pattern
