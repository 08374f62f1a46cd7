"""The adapters of a model, by name: which of them are summed, and how much of each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import nn

from ..lang.diagnostics import ApplyError, Diagnostic, did_you_mean
from .in_place import InPlaceChange
from .patch import Patch, adapter_changes, patches
from .per_sample import Row, by_rows
from .refuse import refuse_selected

Name = str | None
"""Of an adapter; None is the one that was given none."""


class Adapters:
    """A look at the adapters of a model, through `graphpatch.adapters(model)`.

    An adapter is all that patches added under one name. What it is made of, and which adapters are active, stands on
    the model, so it survives deepcopy and pickle, and any number of these objects say the same. No method touches a
    factor or a `requires_grad` flag: an adapter that is not active keeps its flags, and gets no gradient.
    """

    def __init__(self, model: nn.Module):
        self.model = model

    # ── what there is ──
    @property
    def names(self) -> tuple[Name, ...]:
        """Of all adapters, in the order in which they came; None stands for the unnamed one."""
        return tuple(self._changes())

    @property
    def active(self) -> tuple[Name, ...]:
        """Of those that are summed."""
        return tuple(name for name, changes in self._changes().items() if any(c.active for c in changes))

    def patches(self, name: Name) -> list[Patch]:
        """The handles of the patches that make up this adapter. Raises `ApplyError` (GP545) for an unknown name."""
        self._known([name])
        return [patch for patch in patches(self.model) if any(_name(c) == name for c in _adapter_changes(patch))]

    # ── which ──
    def activate(self, *names: Name) -> None:
        """Have the model compute with these and no others: their updates are summed. With no name, with none.

        Stays so until it is said otherwise, unlike `patch.disabled()`, which nests with it. Raises `ApplyError` (GP545)
        for a name that no adapter has; then nothing has changed.
        """
        wanted = self._known(names)
        self._set({name: name in wanted for name in self.names})

    def deactivate(self, *names: Name) -> None:
        """Switch these off, and leave the others as they are. With no name, all."""
        self._set(dict.fromkeys(self._known(names) if names else self.names, False))

    def _set(self, active: Mapping[Name, bool]) -> None:
        refuse_selected(self.model)
        everything = self._changes()
        changing = {name: [c for c in everything[name] if c.active != on] for name, on in active.items()}
        _refuse_merged(changing)
        for name, changes in changing.items():
            for change in changes:
                change.active = active[name]
                change.show()

    def weights(self, weights: Mapping[Name, float] | None = None) -> dict[Name, float]:
        """Multiply each adapter's update by a number, at run time; those not named keep theirs. Returns all of them.

        Factors stay what they are, and so does what `save_adapter` writes: `combine` makes an adapter of a weighted
        sum. Of DoRA, which is no sum, the number multiplies the scale inside; 0 switches any kind off.
        Raises `ApplyError`: GP545 for an unknown name, GP546 for a number that is not finite.
        """
        changes = self.check_weights({} if weights is None else weights)
        if weights:
            refuse_selected(self.model)
            _refuse_merged(changes)
        for name, weight in (weights or {}).items():
            for change in changes[name]:
                if change.weight != weight:
                    change.weight = float(weight)
                    change.show()
        return {name: held[0].weight for name, held in self._changes().items()}

    def check_weights(self, weights: Mapping[Name, float]) -> dict[Name, list[InPlaceChange]]:
        """What the named adapters are made of; raises as `weights` does."""
        if not isinstance(weights, Mapping):
            raise ApplyError(Diagnostic("GP546", "weights are given by name", fixes=("weights({name: number, ...})",)))
        changes = self._known(weights)
        for name, weight in weights.items():
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
                raise ApplyError(Diagnostic("GP546", f"{weight!r} is no weight for {quoted(name)}: a finite number is"))
        return changes

    @contextmanager
    def per_sample(self, rows: Sequence[Row]) -> Iterator[None]:
        """Within, each sample of a batch has an adapter of its own: a name, several (a tuple: their sum), or none.

        `rows` has one entry a sample. None is the unnamed adapter where the model has one, and no adapter else; `()` is
        always none. Weights hold, the active set does not. A batch may have k rows for each sample, those of one sample
        beside each other, as `generate` with beams has it, and as an input of (batch * length, features) has it.
        Gradients are right; a model that recomputes its activations in backward is refused.

        Raises `ApplyError`: GP545 for an unknown name; GP547 where the rows of a module's input cannot be told apart
        (routed experts, inputs of (length, batch, ...)), or GP548 within, where a batch is none of so many samples.
        """
        selection = [self._selected(row) for row in _samples(rows)]
        changes = self._changes()
        _refuse_merged(changes)
        with by_rows(self.model, selection, changes):
            yield

    def delete(self, *names: Name) -> None:
        """Take adapters off the model: revert the patches that added them.

        Raises `ApplyError`: GP545 for an unknown name, GP546 where one of those patches added another adapter too,
        and as `Patch.revert` does.
        """
        refuse_selected(self.model)
        leaving = self._known(names)
        going = [p for p in patches(self.model) if any(_name(c) in leaving for c in _adapter_changes(p))]
        for patch in going:
            staying = {_name(c) for c in _adapter_changes(patch)} - leaving.keys()
            if staying:
                raise ApplyError(
                    Diagnostic(
                        "GP546",
                        f"{quoted(next(iter(leaving)))} came with {', '.join(map(quoted, staying))} in one patch",
                        fixes=("delete both, or switch this one off: adapters(model).deactivate(...)",),
                    )
                )
        for patch in reversed(going):
            patch.revert()

    # ── ──
    def _changes(self) -> dict[Name, list[InPlaceChange]]:
        """What each adapter is made of."""
        found: dict[Name, list[InPlaceChange]] = {}
        for patch in patches(self.model):
            for change in _adapter_changes(patch):
                found.setdefault(_name(change), []).append(change)
        return found

    def _known(self, names: Iterable[Name]) -> dict[Name, list[InPlaceChange]]:
        changes = self._changes()
        asked = list(names)
        for name in asked:
            if not isinstance(name, (str, type(None))) or name not in changes:
                raise _unknown(name, changes)
        return {name: changes[name] for name in asked}

    def _selected(self, row: Row) -> tuple[Name, ...]:
        if row is None:
            return (None,) if None in self._changes() else ()
        return tuple(self._known(row if isinstance(row, (tuple, list)) else (row,)))

    def __repr__(self) -> str:
        active, weights = self.active, self.weights()
        said = [
            quoted(name)
            + ("" if weights[name] == 1.0 else f" x {weights[name]:g}")
            + ("" if name in active else " off")
            for name in weights
        ]
        return f"<Adapters {', '.join(said) or 'none'}>"


def _adapter_changes(patch: Patch) -> list[InPlaceChange]:
    return list(adapter_changes(patch._journal))


def _name(change: InPlaceChange) -> Name:
    name: Name = change.entry.adapter
    return name


def _refuse_merged(changes: Mapping[Name, Iterable[InPlaceChange]]) -> None:
    """Raise (GP546) where one is part of the weights by now, and can neither leave the sum nor be weighted."""
    for name, held in changes.items():
        if any(change.merged for change in held):
            fix = "take it out first: patch.unmerge()"
            raise ApplyError(Diagnostic("GP546", f"{quoted(name)} is merged into the weights", fixes=(fix,)))


def _samples(rows: Sequence[Row]) -> Sequence[Row]:
    if isinstance(rows, (str, Mapping)) or not isinstance(rows, Iterable):
        fix = "one entry a sample, in the order of the batch: per_sample([name, None, (name, name), ...])"
        raise ApplyError(Diagnostic("GP547", f"{rows!r} does not say an adapter for each sample", fixes=(fix,)))
    return list(rows)


def quoted(name: object) -> str:
    return "the unnamed adapter" if name is None else f"`{name}`"


def _unknown(name: object, known: Iterable[Name]) -> ApplyError:
    names = [n for n in known if n is not None]
    near = did_you_mean(name, names) if isinstance(name, str) else "names are strings, one an argument"
    there = ", ".join(map(quoted, known)) or "none"
    title = f"this model has no adapter called `{name}`" if name is not None else "this model has no unnamed adapter"
    return ApplyError(Diagnostic("GP545", title, text=(f"there: {there}",), fixes=(near,) if near else ()))


def adapters(model: nn.Module) -> Adapters:
    """The adapters of `model`, by name: which there are, which are summed, and how much of each.

    A compiled model, one under DDP, or any module that holds the patched one will do.
    """
    return Adapters(model)
