"""The shortest lists by which PEFT's matching reaches exactly what is meant, and nothing else of the model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

_Value = TypeVar("_Value", int, float)


class Names(NamedTuple):
    """Entries of `target_modules`, and the names that they would reach beyond what is meant."""

    entries: list[str]
    beyond: list[str]


def ends(wanted: Sequence[str], names: Iterable[str]) -> Names:
    """Entries of a list that name `wanted` among `names`: for each the shortest end, behind a dot, of no other name."""
    meant = set(wanted)
    taken = {end for name in names if name not in meant for end in _ends(name)}
    entries, whole = set(), set()
    for name in wanted:
        end = next((end for end in _ends(name) if end not in taken), None)
        if end is None:
            whole.add(name)  # not even the whole name is its own: another ends in it
        entries.add(end or name)
    beyond = [name for name in names if name not in meant and not whole.isdisjoint(_ends(name))] if whole else []
    return Names(sorted(entries), beyond)


def _ends(name: str) -> Iterator[str]:
    """`q_proj`, `self_attn.q_proj` and so on, to the whole name."""
    at = len(name)
    while (at := name.rfind(".", 0, at)) >= 0:
        yield name[at + 1 :]
    yield name


def patterns(values: Mapping[str, _Value], default: _Value) -> dict[str, _Value]:
    """A `rank_pattern` that gives each name its value, where all that no key matches have the default."""
    by_end: dict[str, set[_Value]] = {}
    for name, value in values.items():
        for end in _ends(name):
            by_end.setdefault(end, set()).add(value)
    found: dict[str, _Value] = {}
    for name, value in values.items():
        if value != default:
            own = next((end for end in _ends(name) if by_end[end] == {value}), None)
            found[f"^{re.escape(name)}" if own is None else re.escape(own)] = value
    return dict(sorted(found.items()))


def commonest(values: Iterable[_Value]) -> _Value:
    """The value that most have; of several, the least."""
    counts = Counter(values)
    return min(counts, key=lambda value: (-counts[value], value))


def saved_name(path: str, names: Sequence[str], spared: Sequence[str]) -> str | None:
    """An entry of `modules_to_save` for one module: all whose names end in its letters are copied, dot or not, and no
    target (`spared`) may be at or below one. None where there is none."""
    others = [name for name in names if name != path]
    for end in _ends(path):
        if any(name.endswith(end) for name in others):
            continue
        try:
            keeps_off = re.compile(rf"(^|.*\.){end}($|\..*)")
        except re.error:
            continue
        if not any(keeps_off.match(name) for name in spared):
            return end
    return None
