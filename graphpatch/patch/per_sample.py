"""One batch, and an adapter for each sample: the modules compute by rows for as long as a context lasts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..lang.diagnostics import ApplyError, Diagnostic
from ..rewrites.by_row import ByRow, Rows
from .drift import unwrapped
from .in_place import InPlaceChange
from .record import SELECTED, roots
from .refuse import refuse_selected
from .subclass import bypassed, class_with, is_foreign, set_class

Name = str | None
Row = str | None | tuple[Name, ...]
"""What one sample computes with: an adapter's name, several (their sum), or none."""
Changes = Mapping[Name, Sequence[InPlaceChange]]
"""What each adapter is made of."""


@contextmanager
def by_rows(model: nn.Module, selection: Sequence[tuple[Name, ...]], changes: Changes) -> Iterator[None]:
    """Within, sample i computes with the adapters `selection[i]`."""
    refuse_selected(model)
    if not selection:
        raise ApplyError(Diagnostic("GP547", "adapters were chosen for no sample", fixes=("per_sample([name, ...])",)))
    alike = all(row == selection[0] for row in selection)
    rows = {} if alike else _rows(model, selection, changes)
    every = [change for held in changes.values() for change in held]
    active = [change.active for change in every]
    marked = list(roots(model))
    classes: list[tuple[nn.Module, type]] = []
    try:
        for root in marked:
            root.__dict__[SELECTED] = True
        chosen = {id(change) for name in (selection[0] if alike else ()) for change in changes[name]}
        _show(every, [id(change) in chosen for change in every])
        for module, held in rows.items():
            classes.append((module, type(module)))
            set_class(module, class_with(module, lambda mixins: (*mixins, ByRow)))
            module.__dict__[ByRow.entries] = (held,)
        yield
    finally:
        for module, cls in classes:
            module.__dict__.pop(ByRow.entries, None)
            set_class(module, cls)
        _show(every, active)
        for root in marked:
            root.__dict__.pop(SELECTED, None)


def _show(changes: Sequence[InPlaceChange], active: Sequence[bool]) -> None:
    for change, on in zip(changes, active):
        if change.active != on:
            change.active = on
            change.show()


def _rows(model: nn.Module, selection: Sequence[tuple[Name, ...]], changes: Changes) -> dict[nn.Module, Rows]:
    """For each module that computes otherwise from sample to sample. Raises `ApplyError` (GP547) where one cannot."""
    model = unwrapped(model)
    places = _Places(model)
    if any(getattr(m, "gradient_checkpointing", False) is True and m.training for m in model.modules()):
        raise _mixed("this model recomputes its activations in backward, when the choice is gone", "", "model.eval()")
    chosen: dict[nn.Module, list[tuple[Any, tuple[int, ...]]]] = {}
    for name, held in changes.items():
        samples = tuple(i for i, row in enumerate(selection) if name in row)
        for change in held if samples else ():
            entry = None if change.off else change.when_active
            for module in change.modules if entry is not None else ():
                places.check(module, change)
                chosen.setdefault(module, []).append((entry, samples))
    return {module: Rows(len(selection), tuple(held), places.path(module)) for module, held in chosen.items()}


class _Places:
    """The paths of a model's modules, and whether the rows of their inputs are those of the batch."""

    def __init__(self, model: nn.Module):
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.paths: dict[nn.Module, list[str]] = {}
        for path, module in self.modules.items():
            self.paths.setdefault(module, []).append(path)
        self._faults: dict[str, str] = {"": _time_first(model)}

    def path(self, module: nn.Module) -> str:
        return self.paths.get(module, ["?"])[0]

    def check(self, module: nn.Module, change: InPlaceChange) -> None:
        path = self.path(module)
        if not change.mixin.by_row:
            raise _mixed(f"`{change.mark.op}` computes for all rows at once", path)
        if is_foreign(module) or bypassed(module):
            raise _mixed("its class or its forward was changed since it was patched", path)
        for each in self.paths.get(module, ()):
            why = self._fault(each)
            if why:
                raise _mixed(why, path)

    def _fault(self, path: str) -> str:
        """What keeps a module's rows from being those of the batch, there or anywhere above."""
        if path not in self._faults:
            above, _, name = path.rpartition(".")
            module = self.modules[path]
            self._faults[path] = self._fault(above) or _routed(name, module) or _time_first(module)
        return self._faults[path]


def _routed(name: str, module: nn.Module) -> str:
    """Rows that a router sends on are none of the batch's, in no order that can be told."""
    for said in (name.lower(), type(module).__name__.lower()):
        if "expert" in said and "shared" not in said:
            return "a router chooses its rows"
    return ""


def _time_first(module: nn.Module) -> str:
    for part in (module, *module._modules.values()):
        if getattr(part, "batch_first", None) is False:
            return f"a {type(part).__name__} beside or around it takes (length, batch, ...), so its rows are no samples"
    return ""


def _mixed(why: str, path: str, *fixes: str) -> ApplyError:
    title = f"`{path or '^'}` cannot tell the samples of a batch apart"
    return ApplyError(Diagnostic("GP547", title, text=(why,), fixes=(*fixes, "run one batch for each adapter")))
