"""The `map` statements: which keys of another checkpoint make which of the model's, and the other way.

All maps read the original keys at once and none reads what another made, so two names may change places.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

from ..lang.diagnostics import Diagnostic, PlanError
from ..lang.formatter import format_statement
from ..lang.syntax import At, Index, KeyStep, Map, OpCall, Range, Var
from ..tree.pattern import Bounds, within
from .rules import maps_in_force
from .scope import FileScope, World

Bindings = Mapping[str, int]


class Piece(NamedTuple):
    """Keys that become others: one to one, several to one (gathered), or one to several (split)."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    """Empty for keys that are left behind."""
    layout: OpCall | None
    scope: FileScope | None
    """The names that the layout sees."""
    bindings: Bindings


def translated(world: World, keys: Iterable[str]) -> tuple[list[Piece], list[str]]:
    """What each of `keys`, those of another checkpoint, becomes in the model, and the maps that fit none of them, as
    written. Keys that no map speaks of keep their names.

    Raises `PlanError`: GP471 for a key that two maps speak of, or two make, GP472 for gathered keys of which some are
    missing, GP473 for a map that cannot be carried out so.
    """
    ways = [_Way.onward(scope, held) for scope, held in maps_in_force(world)]
    idle: list[_Way] = []
    pieces = _carry(ways, dict.fromkeys(keys, ()), idle)
    return pieces, [" ".join(format_statement(way.statement).split()) for way in idle]


def restored(world: World, shapes: Mapping[str, tuple[int, ...]]) -> list[Piece]:
    """The other way: what each of the model's keys is in the other checkpoint; `sources` are the model's.

    Raises `PlanError` as `translated` does, and GP474 for a map that has no way back.
    """
    ways = [_Way.back(scope, held) for scope, held in maps_in_force(world) if held.target is not None]
    return _carry(ways, shapes, [])


def _carry(ways: Sequence[_Way], keys: Mapping[str, tuple[int, ...]], idle: list[_Way]) -> list[Piece]:
    taken: dict[str, Map] = {}
    pieces: list[Piece] = []
    for way in ways:
        found = list(way.pieces(keys))
        idle += [] if found else [way]
        for piece in found:
            for key in piece.sources:
                if key in taken:
                    raise way.problem("GP471", f"two maps speak of the key `{key}`", "a key is read once")
                taken[key] = way.statement
        pieces += found
    pieces += [Piece((key,), (key,), None, None, {}) for key in keys if key not in taken]
    made: dict[str, Piece] = {}
    for piece in pieces:
        for target in piece.targets:
            if target in made:
                both = f"`{made[target].sources[0]}` and `{piece.sources[0]}` both become it"
                raise PlanError(Diagnostic("GP471", f"two keys become `{target}`", text=(both,)))
            made[target] = piece
    return pieces


@dataclass(frozen=True)
class _Way:
    """A map statement, read in one direction."""

    scope: FileScope
    statement: Map
    source: tuple[KeyStep, ...]
    name: Callable[[Bindings, tuple[str, ...], tuple[str, ...]], str] | None
    """The key that captures, alternatives and wildcards make; None for `-> none`."""
    alternatives: tuple[tuple[str, ...], ...]
    """Of the target's braces."""
    named: frozenset[str]
    """The captures that the target uses."""
    lost: str | None = None
    """A capture that only the target has: that of the tensors of a stack."""

    @classmethod
    def onward(cls, scope: FileScope, held: Map) -> _Way:
        if held.target is None:
            return cls(scope, held, held.source, None, (), frozenset())
        target = held.target

        def index(step: KeyStep, bindings: Bindings) -> str:
            assert step.at is not None
            return str(_Bound(scope, bindings).integer(step.at))

        uses = frozenset(name for step in target if step.at is not None for name in _variables(step.at))
        return cls(scope, held, held.source, _namer(target, index), _braces(target), uses)

    @classmethod
    def back(cls, scope: FileScope, held: Map) -> _Way:
        assert held.target is not None
        captured = {step.index.capture: step.index for step in held.source if step.index and step.index.capture}
        turned = []
        for step in held.target:
            if step.at is None:
                turned.append(step)
            elif isinstance(step.at, Var) and step.at.name in captured:
                turned.append(step.model_copy(update={"index": captured[step.at.name]}))
            elif not captured.keys() & set(_variables(step.at)):
                fixed = Index(spans=(At(at=step.at, span=step.span),), span=step.span)
                turned.append(step.model_copy(update={"index": fixed, "at": None}))
            else:
                raise PlanError(
                    scope.finding("GP474", "this map has no way back: its index is worked out", held.span, "write [$i]")
                )

        def index(step: KeyStep, bindings: Bindings) -> str:
            assert step.index is not None
            if step.index.capture is not None and step.index.capture in bindings:
                return str(bindings[step.index.capture])
            match step.index.spans:
                case (At(at=at),):
                    return str(scope.integer(at))
            raise PlanError(
                scope.finding("GP474", "this map has no way back: an index is lost in it", held.span, "capture it")
            )

        uses = frozenset(step.index.capture for step in held.source if step.index and step.index.capture)
        there = {step.at.name for step in turned if isinstance(step.at, Var)}
        lost = sorted(uses - there)
        stacked = held.using is not None and held.using.name == "stack" and not held.using.args
        if len(lost) > 1 or (lost and not stacked):
            raise PlanError(
                scope.finding("GP474", "this map has no way back: an index is lost in it", held.span, "using stack()")
            )
        return cls(scope, held, tuple(turned), _namer(held.source, index), _braces(held.source), uses, *lost)

    def pieces(self, keys: Mapping[str, tuple[int, ...]]) -> Iterator[Piece]:
        """The keys that it reads, gathered and split."""
        pattern = _pattern(self.source)
        braces = _braces(self.source)
        groups: dict[Any, list[tuple[Any, str]]] = {}
        for key, found in self._found(pattern, keys):
            parts = found.groupdict()
            bindings = {n[2:]: int(v) for n, v in parts.items() if n.startswith("i_")}
            chosen = tuple(parts[f"b{at}"] for at in range(len(braces)))
            wild = tuple(v for n, v in parts.items() if n.startswith("w"))
            kept = {n: v for n, v in bindings.items() if n in self.named}
            gathered = tuple(v for n, v in sorted(bindings.items()) if n not in self.named)
            order = tuple(choices.index(c) for choices, c in zip(braces, chosen))
            # Alternatives on both sides stand for each other, place by place.
            paired = order if self.alternatives and len(self.alternatives) == len(braces) else ()
            group = (tuple(sorted(kept.items())), wild, paired)
            groups.setdefault(group, []).append(((gathered, () if paired else order), key))
        for (kept_items, wild, paired), members in groups.items():
            kept = dict(kept_items)
            sources = tuple(key for _, key in sorted(members))
            if self.name is None:
                yield Piece(sources, (), None, None, {})
                continue
            self._check_whole(sources, [order for (_, order), _ in members], braces, paired)
            if paired:
                if [len(c) for c in braces] != [len(c) for c in self.alternatives]:
                    raise self.problem("GP473", "braces on both sides stand for each other", "as many names in each")
                choices = [tuple(c[at] for c, at in zip(self.alternatives, paired))]
            else:
                choices = list(product(*self.alternatives))
            counted = [kept]
            if self.lost is not None:  # the parts of a stack have the numbers from zero on
                counted = [{**kept, self.lost: at} for at in range(keys[sources[0]][0])]
            targets = tuple(self.name(one, choice, wild) for choice in choices for one in counted)
            if (len(sources) > 1 or len(targets) > 1) and self.statement.using is None:
                raise self.problem(
                    "GP473", f"{len(sources)} keys become {len(targets)}, and nothing says how", "using concat(dim=0)"
                )
            yield Piece(sources, targets, self.statement.using, self.scope, kept)

    def _found(self, pattern: re.Pattern[str], keys: Iterable[str]) -> list[tuple[str, re.Match[str]]]:
        """The keys that fit, also by their indices; a slice's length is the highest index plus one, per container."""
        found = [(key, match) for key in keys if (match := pattern.fullmatch(key))]
        for at, step in enumerate(self.source):
            if step.index is None or (bounds := self._bounds(step.index)) is None:
                continue
            group = f"x{at}"
            lengths: dict[str, int] = {}
            for key, match in found:
                container = key[: match.start(group)]
                lengths[container] = max(lengths.get(container, 0), int(match[group]) + 1)
            found = [
                (key, match)
                for key, match in found
                if any(within(b, int(match[group]), lengths[key[: match.start(group)]]) for b in bounds)
            ]
        return found

    def _bounds(self, index: Index) -> list[Bounds] | None:
        """What an index lets through; None for any."""
        bounds: list[Bounds] = []
        for span in index.spans:
            if isinstance(span, At):
                bounds.append(self.scope.integer(span.at))
            elif isinstance(span, Range):
                start, stop, step = (
                    None if one is None else self.scope.integer(one) for one in (span.start, span.stop, span.step)
                )
                if step == 0:
                    raise PlanError(self.scope.finding("GP235", "a slice cannot have step 0", span.span))
                bounds.append((start, stop, step))
            else:
                return None
        return bounds or None

    def _check_whole(self, sources: Sequence[str], orders: list[Any], braces: Any, paired: Any) -> None:
        wanted = 1
        for choices in braces:
            wanted *= len(choices)
        if not paired and wanted > 1 and len(set(orders)) < wanted:
            raise self.problem("GP472", f"of {wanted} keys to be put together {len(set(orders))} are there", sources[0])

    def problem(self, code: str, title: str, label: str) -> PlanError:
        return PlanError(self.scope.finding(code, title, self.statement.span, label))


def _namer(steps: Sequence[KeyStep], index: Callable[[KeyStep, Bindings], str]) -> Any:
    def name(bindings: Bindings, choice: tuple[str, ...], wild: tuple[str, ...]) -> str:
        choices, rest, parts = iter(choice), iter(wild), []
        for step in steps:
            text = step.name
            if not step.quoted:
                text = re.sub(r"\{[^{}]*\}", lambda _: next(choices), text)
                text = re.sub(r"\*+", lambda _: next(rest, ""), text)
            parts += [text] if text else []
            if step.at is not None or step.index is not None:
                parts.append(index(step, bindings))
        return ".".join(parts)

    return name


def _braces(steps: Sequence[KeyStep]) -> tuple[tuple[str, ...], ...]:
    return tuple(
        tuple(choice.strip() for choice in inside.split(","))
        for step in steps
        if not step.quoted
        for inside in re.findall(r"\{([^{}]*)\}", step.name)
    )


def _pattern(steps: Sequence[KeyStep]) -> re.Pattern[str]:
    """What the keys look like; its groups: alternatives b0, wildcards w0, captures i_NAME, indices x0."""
    counters = {"b": 0, "w": 0}
    return re.compile(r"\.".join(_step_pattern(step, at, counters) for at, step in enumerate(steps)))


def _step_pattern(step: KeyStep, at: int, counters: dict[str, int]) -> str:
    text = ""
    for part in [step.name] if step.quoted else re.split(r"(\{[^{}]*\}|\*+)", step.name):
        if step.quoted or not part or part[0] not in "{*":
            text += re.escape(part)
        elif part[0] == "{":
            choices = "|".join(re.escape(c.strip()) for c in part[1:-1].split(","))
            text += f"(?P<b{counters['b']}>{choices})"
            counters["b"] += 1
        else:
            text += f"(?P<w{counters['w']}>{'.+' if part == '**' else '[^.]*'})"
            counters["w"] += 1
    capture = step.index.capture if step.index is not None else step.at.name if isinstance(step.at, Var) else None
    if step.index is not None or step.at is not None:
        number = rf"(?P<i_{capture}>\d+)" if capture else r"\d+"
        text += rf"\.(?P<x{at}>{number})"
    return text


def _variables(expression: Any) -> Iterator[str]:
    if isinstance(expression, Var):
        yield expression.name
    for value in getattr(expression, "__dict__", {}).values():
        for one in value if isinstance(value, (list, tuple)) else (value,):
            if hasattr(one, "kind"):
                yield from _variables(one)


class _Bound(FileScope):
    """A file's names, and the captured indices."""

    def __init__(self, scope: FileScope, bindings: Bindings):
        super().__init__(scope.world, scope.file)
        self.bindings = bindings

    def var(self, name: str, span: Any) -> Any:
        return self.bindings[name] if name in self.bindings else super().var(name, span)


def bound(piece: Piece) -> FileScope:
    """The names that a piece's layout sees."""
    assert piece.scope is not None
    return _Bound(piece.scope, piece.bindings)
