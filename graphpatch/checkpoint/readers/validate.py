"""The table, run on an adapter: what each reader makes of it, and how much of it has an effect on the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from os import PathLike
from typing import Any, Literal, NamedTuple

from ...lang.diagnostics import Diagnostic, Error, did_you_mean
from ...tree.tree import Tree
from .adapter import Adapter
from .case import Case
from .effective import Reached
from .table import READERS, TABLE, Row

Verdict = Literal["accepted", "refused", "misread"]
_SHOWN = 3
FORMAT = 1
"""The version of the JSON form."""


class Finding(NamedTuple):
    """A row of the table that an adapter goes against."""

    row: Row
    total: int
    witnesses: tuple[str, ...]
    """The first of them."""

    def diagnostic(self) -> Diagnostic:
        more = self.total - len(self.witnesses)
        return Diagnostic(
            "GP633",
            f"{self.row.reader} {'refuses' if self.row.effect == 'refused' else 'misreads'} it: {self.row.says}",
            text=(*self.witnesses, *([f"and {more} more"] if more else []), f"source: {self.row.source}"),
            fixes=(self.row.fix,),
            severity="error" if self.row.effect == "refused" else "warning",
        )


@dataclass(frozen=True)
class Report:
    """What was found of one adapter."""

    adapter: Adapter
    readers: tuple[str, ...]
    findings: tuple[Finding, ...]
    reached: tuple[Reached, ...] | None
    """What becomes of each module of the adapter in the model; None where no model was given."""

    @property
    def effective(self) -> int | None:
        """How many modules have an effect."""
        return None if self.reached is None else sum(not one.why for one in self.reached)

    @property
    def dead(self) -> Diagnostic | None:
        """That parts of the adapter, or all of it, do nothing on this model."""
        if self.reached is None or self.effective == len(self.reached) > 0:
            return None
        lost = [f"{one.path}: {one.why}" for one in self.reached if one.why]
        return Diagnostic(
            "GP634",
            f"{self.effective} of {len(self.reached)} modules of this adapter have an effect on this model",
            text=(*lost[:_SHOWN], *([f"and {len(lost) - _SHOWN} more"] if len(lost) > _SHOWN else [])),
            fixes=("the keys must have the paths of the model: is it the one that the adapter was trained on?",),
        )

    def verdict(self, reader: str) -> Verdict:
        effects = {f.row.effect for f in self.findings if f.row.reader == reader}
        return "refused" if "refused" in effects else "misread" if "misread" in effects else "accepted"

    @property
    def clean(self) -> bool:
        return not self.findings and self.dead is None

    @property
    def diagnostics(self) -> list[Diagnostic]:
        return [*([self.dead] if self.dead else []), *(finding.diagnostic() for finding in self.findings)]

    def to_json(self) -> dict[str, Any]:
        lost = [{"path": one.path, "why": one.why} for one in self.reached or () if one.why]
        return {
            "format": FORMAT,
            "adapter": self.adapter.folder,
            "layout": self.adapter.layout,
            "modules": len(self.adapter.factors),
            "effective": self.effective,
            "without_effect": lost,
            "readers": {
                reader: {
                    "verdict": self.verdict(reader),
                    "findings": [
                        {"name": f.row.name, "effect": f.row.effect, "says": f.row.says, "count": f.total,
                         "witnesses": list(f.witnesses), "fix": f.row.fix, "source": f.row.source}
                        for f in self.findings if f.row.reader == reader
                    ],
                }
                for reader in self.readers
            },
        }  # fmt: skip


def validate_adapter(
    adapter: str | PathLike[str] | Adapter,
    model: Any = None,
    readers: str | Sequence[str] = ("vllm", "sglang", "trtllm", "llamacpp", "peft"),
    *,
    max_rank: int | None = None,
) -> Report:
    """Hold an adapter against what its readers accept, and count the modules on which it has an effect.

    `adapter` is a directory. `model` is a module (on any device, meta too) or a `Tree`; without one, rows that need it
    find nothing. `readers` are names of `READERS`, a sequence or `"vllm,sglang"`. `max_rank` is what the server was
    started with. No weight is read, no code of the adapter run, and torch not imported.

    Raises `Error`: GP631 where there is no adapter that can be read, GP632 for an unknown reader, GP638 for a
    directory in graphpatch's own format, which must be exported first.
    """
    names = readers_of(readers)
    if not isinstance(adapter, Adapter):
        adapter = Adapter.read(adapter)
    if adapter.layout == "graphpatch":
        raise Error(
            Diagnostic(
                "GP638",
                f"{adapter.folder} is an adapter in graphpatch's own format, which no server reads",
                fixes=(f"export it first: graphpatch export {adapter.folder} OUT --for {names[0]}",),
            )
        )
    tree = model if model is None or isinstance(model, Tree) else Tree.of(model)
    case = Case(adapter, tree, max_rank)
    findings = tuple(found for name in names for found in _findings(name, case))
    return Report(adapter, names, findings, tuple(case.reached) if tree is not None else None)


def readers_of(said: str | Sequence[str]) -> tuple[str, ...]:
    """The readers that are meant; raises `Error` (GP632) for one that is unknown."""
    words = said.split(",") if isinstance(said, str) else said
    names = tuple(dict.fromkeys(word.strip().lower() for word in words if word.strip()))
    for name in names:
        if name not in READERS:
            near = did_you_mean(name, READERS)
            raise Error(
                Diagnostic(
                    "GP632",
                    f"no reader is called `{name[:60]}`",
                    fixes=tuple(filter(None, (near, f"there are {', '.join(READERS)}"))),
                )
            )
    if not names:
        raise Error(Diagnostic("GP632", "no reader is named", fixes=(f"there are {', '.join(READERS)}",)))
    return names


def _findings(reader: str, case: Case) -> Iterator[Finding]:
    for row in TABLE:
        if row.reader != reader:
            continue
        witnesses = iter(row.check(case))
        shown = tuple(islice(witnesses, _SHOWN))
        if shown:
            yield Finding(row, len(shown) + sum(1 for _ in witnesses), shown)
            if row.name == "layout":
                return  # of another's files nothing else can be said
