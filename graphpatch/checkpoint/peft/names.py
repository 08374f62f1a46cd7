"""Targets known by name: from the keys of an adapter's weights, where its config says less than they do.

`all-linear` and no targets at all ask for the model, and a regex that could run without end is not run. The weights
name the modules that PEFT found then, one by one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from os import fspath
from pathlib import Path
from typing import NamedTuple

from ...lang.diagnostics import Error
from ...lang.formatter import format_selector
from ...lang.regex import problem
from ...lang.syntax import At, Index, Literal_, PathSelector, Range
from ...tree.headers import read_header
from .config import TENSORS, LoraConfig
from .keys import adapter_path, canonical
from .matching import named_by, value_of
from .reach import is_all_linear
from .terms import End, step


class Named(NamedTuple):
    """A target, and what its config says of it."""

    name: str
    rank: int
    alpha: float


def asks_for_names(config: LoraConfig) -> bool:
    """Whether the config alone does not say which modules are meant, on any model."""
    given = config.target_modules
    if given is None:
        return not config.target_parameters
    return is_all_linear(config) or (isinstance(given, str) and problem(given) is not None)


def keys_of(folder: Path) -> list[str]:
    """The keys of an adapter's weights; none where there is no file that can be read. No tensor is."""
    try:
        return list(read_header(fspath(folder / TENSORS)).tensors)
    except Error:
        return []


def module_paths(config: LoraConfig, keys: Iterable[str]) -> list[str]:
    """The modules that canonical keys give an adapter, less those whose parameters have one."""
    owners = [name.rpartition(".")[0] for name in config.target_parameters or []]
    found = dict.fromkeys(path for key in keys if (path := adapter_path(key)) is not None)
    paths = [path for path in found if ".base_layer" not in path]
    return [path for path in paths if not named_by(owners, path)]


def named_targets(config: LoraConfig, keys: Iterable[str]) -> list[Named]:
    return [of_name(config, path) for path in module_paths(config, map(canonical, keys))]


def of_name(config: LoraConfig, name: str) -> Named:
    rank = value_of(config.rank_pattern, name, config.r)
    return Named(name, rank, value_of(config.alpha_pattern, name, config.lora_alpha))


def selectors(names: Sequence[str], cls: str) -> list[str]:
    """Anchored selectors of these names; those that differ in their first index alone are one."""
    alike: dict[tuple[tuple[str, ...], tuple[str, ...]], list[int]] = {}
    found: list[str] = []
    for name in names:
        segments = name.split(".")
        at = next((i for i, s in enumerate(segments) if i and s.isdecimal() and str(int(s)) == s), None)
        if at is None or at == len(segments) - 1 or not all(s.isidentifier() or s.isdecimal() for s in segments):
            found.append(End(name, anchored=True, cls=cls).selector())
        else:
            alike.setdefault((tuple(segments[:at]), tuple(segments[at + 1 :])), []).append(int(segments[at]))
    for (before, behind), indices in alike.items():
        steps = [step(segment) for segment in (*before, *behind)]
        indexed = Index(spans=tuple(_spans(sorted(set(indices)))))
        steps[len(before) - 1] = steps[len(before) - 1].model_copy(update={"index": indexed})
        found.append(format_selector(PathSelector(anchored=True, steps=tuple(steps), cls=cls)))
    return found


def _spans(indices: Sequence[int]) -> Iterator[At | Range]:
    """`0:24, 30` for the numbers 0 to 23 and 30."""
    start = 0
    for at in range(1, len(indices) + 1):
        if at == len(indices) or indices[at] != indices[at - 1] + 1:
            first, last = (Literal_(value=indices[i]) for i in (start, at - 1))
            stop = Literal_(value=indices[at - 1] + 1)
            yield At(at=first) if first == last else Range(start=first, stop=stop)
            start = at
