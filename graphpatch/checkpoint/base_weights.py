"""A base's names held against a model's, and what is said where they differ."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from ..lang.diagnostics import Diagnostic, Error, did_you_mean

_SHOWN = 8


def find_names(wanted: Collection[str], there: Collection[str]) -> dict[str, str]:
    """For each name of a model's, that of the same tensor in a checkpoint; none for those that are not there.

    A checkpoint of the model inside (`layers.0...` for `model.layers.0...`), or of one around it, has the same names
    but for the first segment, and transformers loads either into either.
    """
    best = {name: name for name in wanted if name in there}
    if len(best) == len(wanted):
        return best
    for prefix in sorted({name.partition(".")[0] + "." for name in wanted}):
        found = {name: name.removeprefix(prefix) for name in wanted}
        best = max(best, {k: v for k, v in found.items() if v in there}, key=len)
    for prefix in sorted({name.partition(".")[0] + "." for name in there}):
        found = {name: prefix + name for name in wanted}
        best = max(best, {k: v for k, v in found.items() if v in there}, key=len)
    return best


def refuse_missing(missing: list[str], there: Iterable[str], what: str) -> None:
    """Raise `Error` (GP642) where there are any."""
    if missing:
        near = did_you_mean(missing[0], list(there)[:5000])
        raise Error(
            Diagnostic(
                "GP642",
                f"{what} has not {len(missing)} of the weights",
                text=(*(f"- {name}   missing" for name in missing[:_SHOWN]), *_more(missing)),
                fixes=tuple(filter(None, (near, "is it the base that the adapter was made on?"))),
            )
        )


def refuse_shapes(shapes: Iterable[tuple[str, tuple[int, ...], tuple[int, ...]]], what: str) -> None:
    """Raise `Error` (GP643) where a shape that is there is not the one that there should be."""
    wrong = [f"{name}: {list(has)}, and it should be {list(should)}" for name, has, should in shapes if has != should]
    if wrong:
        title = f"{len(wrong)} weights of {what} have other shapes"
        fix = "is it the base that the adapter was made on?"
        raise Error(Diagnostic("GP643", title, text=(*wrong[:_SHOWN], *_more(wrong)), fixes=(fix,)))


def refuse_packed(found: list[tuple[str, str]], what: str) -> None:
    """Raise `Error` (GP643) where weights are not kept as numbers that can be added to."""
    if found:
        name, dtype = found[0]
        raise Error(
            Diagnostic(
                "GP643",
                f"{len(found)} weights of {what} are quantised, `{name}` as {dtype.removeprefix('torch.')}",
                fixes=("use the base as it was before it was quantised: the adapter fits that too",),
            )
        )


def _more(lines: list[str]) -> tuple[str, ...]:
    return (f"and {len(lines) - _SHOWN} more",) if len(lines) > _SHOWN else ()
