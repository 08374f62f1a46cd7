"""Merging a patch into the weights it stands beside, and taking it out again.

The weights are written in place, a block of rows at a time: optimizers, hooks and compiled models keep the very
parameters they have. The factors stay registered; only the modules no longer compute with them.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from ..lang.diagnostics import ApplyError, Diagnostic
from .change import WeightChange
from .coded import decoded, is_coded, put
from .in_place import InPlaceChange
from .live_weights import checksum, exchange, kept_as_it_is, live, write
from .merge_into import each, exactly, merge_into, refuse_infinite, warn_of_codes
from .mergeable import weights_of
from .record import Journal, Merged, Place


def merge(root: nn.Module, journal: Journal, others: Sequence[Journal], keep: bool) -> None:
    """Merge what `journal` tells of; `others` are the other patches of the model. Raises `ApplyError` (GP531, GP533),
    and then nothing has changed."""
    weights = weights_of(root, journal)
    if not weights:
        raise ApplyError(Diagnostic("GP531", "there is nothing to merge: this patch changes no weight"))
    kept: dict[int, Tensor] = {}
    begun: list[int] = []
    warn_of_codes(weights)

    def do(at: int) -> None:
        if keep:
            kept[at] = kept_as_it_is(weights[at].place)
        begun.append(at)
        merge_into(weights[at])

    with exactly(weights):
        each(weights, lambda at: refuse_infinite(weights[at]))
        with _uninterrupted():
            try:
                each(weights, do)
            except BaseException as error:
                for at in kept:
                    write(weights[at].place, kept[at])
                raise _half_way(error, 0 if keep else len(begun)) from error
    number = 1 + max((other.merged.number for other in others if other.merged), default=0)
    sums = [checksum(weight.place) for weight in weights] if keep else []
    places, paths = [weight.place for weight in weights], [weight.path for weight in weights]
    journal.merged = Merged(number, places, paths, [kept[at] for at in range(len(weights))] if keep else None, sums)
    _show(journal, merged=True)


def unmerge(
    root: nn.Module, journal: Journal, others: Sequence[Journal], base: Callable[[Mapping[str, Tensor]], Mapping] | None
) -> None:
    """Give the weights back as they were: from what was kept, or from what `base` reads, which gets the weights by
    path and gives tensors of their shapes. Raises `ApplyError` (GP532, GP534), and then nothing has changed."""
    merged = journal.merged
    assert merged is not None
    _refuse_later(merged, others)
    places = dict(zip(merged.paths, merged.places))
    with _uninterrupted():
        if base is not None:
            read = base({path: decoded(p) if is_coded(p) else live(p) for path, p in places.items()})
            for path, place in places.items():
                write(place, read[path])
            _merge_again(root, journal, others)
        elif merged.kept is None:
            raise _kept_nothing()
        else:
            _refuse_changed(merged)
            for place, before in zip(merged.places, merged.kept):
                write(place, before)
        journal.merged = None
        _show(journal, merged=False)


def bake(root: nn.Module, journal: Journal, others: Sequence[Journal]) -> None:
    """Have the merged weights for good, with nothing left to take out. What `journal` tells of has still to be undone,
    but for the weights. Raises `ApplyError` (GP531 to GP533), and then nothing has changed."""
    merged = journal.merged
    places = merged.places if merged else [weight.place for weight in weights_of(root, journal)]
    for other in others:
        earlier = other.merged is not None and (merged is None or other.merged.number < merged.number)
        if earlier and _share(places, other.merged.places):  # type: ignore[union-attr]
            raise _last_in_first_out(other, "merged earlier into the same weights, and taking it out would undo both")
    if merged is None:
        merge(root, journal, others, keep=False)
    journal.merged = None
    # Weights that a loaded adapter brought belong to the result, and so do codes.
    journal.changes = [change for change in journal.changes if not getattr(change, "brings_weights", False)]
    for change in journal.changes:
        if isinstance(change, WeightChange):
            change.originals = []


@contextmanager
def taken_out(journal: Journal, others: Sequence[Journal]) -> Iterator[None]:
    """Within, the weights are what they were before the patch was merged."""
    merged = journal.merged
    if merged is None:
        yield
        return
    _refuse_later(merged, others)
    if merged.kept is None:
        raise _kept_nothing()
    _refuse_changed(merged)
    # Both have the dtype that the model has by now, so that nothing is lost in passing.
    merged.kept[:] = [
        before if is_coded(place) else before.to(live(place).dtype) for place, before in zip(merged.places, merged.kept)
    ]
    try:
        _exchange_all(merged)
        yield
    finally:
        _exchange_all(merged)


# ── refusals ──


def _refuse_later(merged: Merged, others: Sequence[Journal]) -> None:
    """Raise where a patch that was merged later changed the same weights (GP532)."""
    for other in others:
        if other.merged and other.merged.number > merged.number and _share(merged.places, other.merged.places):
            raise _last_in_first_out(other, "merged later into the same weights, and has to come out first")


def _share(one: Sequence[Place], two: Sequence[Place]) -> bool:
    mine = {(id(module), name) for module, name in one}
    return any((id(module), name) in mine for module, name in two)


def _last_in_first_out(other: Journal, why: str) -> ApplyError:
    mark = other.changes[0].mark
    return ApplyError(
        Diagnostic(
            "GP532",
            f"another patch was {why}",
            text=(f"{mark.rule}   {mark.op}",),
            fixes=("graphpatch.patches(model) has its handle: unmerge() or bake() that one first",),
        )
    )


def _kept_nothing() -> ApplyError:
    return ApplyError(
        Diagnostic(
            "GP532",
            "this patch was merged with keep=False, so the weights as they were are not here",
            fixes=(
                "patch.unmerge(base=DIR) reads them from the checkpoint of the base",
                "or patch.bake() ends the patch with the merged weights",
            ),
        )
    )


def _refuse_changed(merged: Merged) -> None:
    for path, place, (dtype, total) in zip(merged.paths, merged.places, merged.sums):
        now = checksum(place)
        if now[0] == dtype and now[1] != total:
            raise ApplyError(
                Diagnostic(
                    "GP534",
                    f"`{path}` was changed after the patch was merged, by training or by loading weights",
                    text=("putting back what was there before would undo that too",),
                    fixes=("patch.unmerge(base=DIR) takes the base's weights from a checkpoint, whatever is here now",),
                )
            )


def _half_way(error: BaseException, left: int) -> BaseException:
    if not isinstance(error, Exception):
        return error
    why = " ".join(str(error).split())[:300] or type(error).__name__
    state = f"{left} weights were merged before: load the base again" if left else "the weights are as they were"
    return ApplyError(Diagnostic("GP533", f"merging failed half-way, and {state}", text=(why,)))


# ── weights ──


def _show(journal: Journal, merged: bool) -> None:
    for change in journal.changes:
        if isinstance(change, InPlaceChange):
            change.merged = merged
            change.show()


def _merge_again(root: nn.Module, journal: Journal, others: Sequence[Journal]) -> None:
    """Patches that were merged earlier are in none of what was read: they are merged into it once more."""
    assert journal.merged is not None
    places = {(id(module), name) for module, name in journal.merged.places}
    for other in sorted((o for o in others if o.merged), key=lambda o: o.merged.number):  # type: ignore[union-attr]
        weights = [weight for weight in weights_of(root, other) if weight.key in places]
        with exactly(weights):
            for weight in weights:
                merge_into(weight)


def _exchange_all(merged: Merged) -> None:
    assert merged.kept is not None
    for at, place in enumerate(merged.places):
        if is_coded(place):
            now = kept_as_it_is(place)
            put(place, merged.kept[at])
            merged.kept[at] = now
        else:
            exchange(live(place), merged.kept[at])


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C waits for the end: half the weights merged and half not would be a model that nobody asked for."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is None:
        yield
        return
    waiting: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: waiting.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if waiting:
            signal.raise_signal(signal.SIGINT)
