"""Whether a `/regex/` is safe to run: it compiles, and it cannot backtrack without bound.

The check reads the tree that `re` itself parses. It refuses what can take exponential time, or time of a high degree:

- an unbounded repeat whose body can match one text in two ways: `(a+)+`, `(a|a)*`, `(a|ab|b)*`;
- too many unbounded repeats that can all match the same text: three in a row, `.*.*.*`, or four with something
  between them, `.*a.*b.*c.*`;
- choices that the next character does not decide, and that multiply: `a?a?a?...`, `(a|aa){40}`.

`(?:\\w+\\.)*` passes: the dot, which `\\w` cannot match, fixes where each round ends. Names are short,
so what is left costs nothing.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterator
from math import log2
from typing import Any

if sys.version_info >= (3, 11):
    from re import _constants as sre  # type: ignore[attr-defined]
    from re import _parser as sre_parse  # type: ignore[attr-defined]
else:  # pragma: no cover
    import sre_constants as sre
    import sre_parse

Chars = frozenset[int]
"""A set of characters: the ASCII codes, and 128 for every other character."""

ALL: Chars = frozenset(range(129))
LONGEST = 500
"""Characters in a pattern, and characters that a bounded repeat may stand for."""
MOST = 3
"""Unbounded repeats that may share a text."""
MOST_CHOICES = 12
"""Bits: how many ways there may be to match one text without an unbounded repeat, as a power of two."""


def problem(pattern: str) -> str | None:
    """What is wrong with a pattern, in one sentence without a capital; None where it may be used."""
    if len(pattern) > LONGEST:
        return f"it is longer than {LONGEST} characters"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            re.compile(pattern)
            tree = sre_parse.parse(pattern)
    except re.error as error:
        return f"it does not compile: {error.msg}" + (f" at character {error.pos + 1}" if error.pos is not None else "")
    except (OverflowError, RecursionError, ValueError):
        return "it does not compile: it is nested too deep, or a number in it is too large"
    check, items = _Check(tree.state.flags | _local_flags(list(tree))), list(tree)
    found = check.sequence(items)
    if found is None and check.choices(items, frozenset()) > MOST_CHOICES:
        found = "it has too many choices that the next character does not decide"
    return found


def _local_flags(items: list[Any]) -> int:
    """The flags that some part sets for itself, `(?i:...)`: taken as if they held everywhere."""
    flags = 0
    for op, arg in items:
        flags |= arg[1] if op is sre.SUBPATTERN else 0
        for body in _bodies(op, arg):
            flags |= _local_flags(body)
    return flags


class _Check:
    def __init__(self, flags: int):
        self.any = ALL if flags & re.DOTALL else ALL - {10}
        self.fold = bool(flags & re.IGNORECASE)

    def sequence(self, items: list[Any]) -> str | None:
        for op, arg in items:
            for body in _bodies(op, arg):
                if found := self.sequence(body):
                    return found
            if op in _REPEATS:
                _, high, body = arg
                if high is not sre.MAXREPEAT and self._width(list(body)) * high > LONGEST:
                    return f"a repeat in it stands for more than {LONGEST} characters"
                if high is sre.MAXREPEAT and op is not _POSSESSIVE and (found := self._ambiguous(list(body))):
                    return found
            elif op in (sre.GROUPREF, sre.GROUPREF_EXISTS):
                return "a back reference can backtrack without bound"
        return self._adjacent(items)

    def _ambiguous(self, body: list[Any]) -> str | None:
        """Whether rounds of an unbounded repeat over `body` can share one text in two ways."""
        if self._nullable(body):
            return "it repeats something that can be empty, and can backtrack without bound"
        return self._undecided(body, self._first(body))

    def _undecided(self, items: list[Any], follow: Chars) -> str | None:
        """A choice in `items` that the next character does not decide; `follow` is what may stand behind them."""
        items = _flat(items)
        for position, (op, arg) in enumerate(items):
            after = items[position + 1 :]
            behind = self._first(after) | (follow if self._nullable(after) else frozenset())
            if op in _REPEATS:
                body = list(arg[2])
                first = self._first(body)
                if arg[0] != arg[1] and op is not _POSSESSIVE and first & behind:
                    return (
                        "it has a repeat inside a repeat that can match the same text, and can backtrack without bound"
                    )
                found = self._undecided(body, behind | first)
            elif op is sre.BRANCH:
                bodies = _bodies(op, arg)
                firsts = [self._first(b) | (behind if self._nullable(b) else frozenset()) for b in bodies]
                if any(firsts[i] & firsts[j] for i in range(len(firsts)) for j in range(i)):
                    return "alternatives under a repeat begin alike, and can backtrack without bound"
                found = next(filter(None, (self._undecided(b, behind) for b in bodies)), None)
            else:
                found = None
            if found:
                return found
        return None

    def _adjacent(self, items: list[Any]) -> str | None:
        """Unbounded repeats in a row that one text can be shared out between: each adds a degree to the cost."""
        run, count, touching = ALL, 0, 0
        for op, arg in _flat(items):
            if op in _REPEATS and arg[1] is sre.MAXREPEAT and op is not _POSSESSIVE:
                chars = self._chars(list(arg[2]))
                if not run & chars:
                    run, count, touching = ALL, 0, 0
                run, count, touching = run & chars, count + 1, touching + 1
                if count > MOST or touching > 2:
                    return "it has too many unbounded repeats that can match the same text"
            elif count and not self._nullable([(op, arg)]):
                # What must stand between two repeats parts them for good only if they cannot match it themselves.
                touching = 0
                if not run & self._chars([(op, arg)]):
                    run, count = ALL, 0
        return None

    def choices(self, items: list[Any], follow: Chars) -> float:
        """Bits of the ways to share out one text between the pieces, where no repeat is without bound."""
        bits = 0.0
        items = _flat(items)
        for position, (op, arg) in enumerate(items):
            after = items[position + 1 :]
            behind = self._first(after) | (follow if self._nullable(after) else frozenset())
            bodies = _bodies(op, arg)
            if op in _REPEATS:
                low, high, body = arg[0], arg[1], bodies[0]
                if high is sre.MAXREPEAT or op is _POSSESSIVE:
                    continue  # judged by `sequence`, or never looked at again
                first = self._first(body)
                if low != high and first & behind:
                    bits += log2(high - low + 1)
                bits += high * self.choices(body, behind | first)
            elif op is sre.BRANCH:
                firsts = [self._first(b) | (behind if self._nullable(b) else frozenset()) for b in bodies]
                if any(firsts[i] & firsts[j] for i in range(len(firsts)) for j in range(i)):
                    bits += log2(len(bodies))
                bits += max(self.choices(b, behind) for b in bodies)
            else:
                bits += sum(self.choices(b, behind) for b in bodies)
        return bits

    # ── what a piece of the tree can match ──

    def _nullable(self, items: list[Any]) -> bool:
        return all(self._item_nullable(op, arg) for op, arg in items)

    def _item_nullable(self, op: Any, arg: Any) -> bool:
        if op in _REPEATS:
            return arg[0] == 0 or self._nullable(list(arg[2]))
        if op is sre.BRANCH:
            return any(self._nullable(list(b)) for b in arg[1])
        if op in _GROUPS:
            return all(self._nullable(b) for b in _bodies(op, arg))
        return op in (sre.AT, sre.ASSERT, sre.ASSERT_NOT, sre.GROUPREF, sre.GROUPREF_EXISTS)

    def _first(self, items: list[Any]) -> Chars:
        """The characters a match may begin with."""
        found: Chars = frozenset()
        for op, arg in items:
            if op in _REPEATS:
                found |= self._first(list(arg[2]))
            elif op is sre.BRANCH:
                found = found.union(*(self._first(list(b)) for b in arg[1]))
            elif op in _GROUPS:
                found = found.union(*(self._first(b) for b in _bodies(op, arg)))
            else:
                found |= self._single(op, arg)
            if not self._item_nullable(op, arg):
                break
        return found

    def _chars(self, items: list[Any]) -> Chars:
        """All characters that may occur in a match."""
        found: Chars = frozenset()
        for op, arg in items:
            bodies = _bodies(op, arg)
            found = found.union(*(self._chars(b) for b in bodies)) if bodies else found | self._single(op, arg)
        return found

    def _width(self, items: list[Any]) -> int:
        total = 0
        for op, arg in items:
            bodies = _bodies(op, arg)
            widest = max((self._width(b) for b in bodies), default=1)
            if op in _REPEATS:
                widest *= max(arg[0], 1) if arg[1] is sre.MAXREPEAT else max(arg[1], 1)
            total += widest
        return total

    def _single(self, op: Any, arg: Any) -> Chars:
        if op is sre.LITERAL:
            return self._literal(arg)
        if op is sre.NOT_LITERAL:
            return (ALL - self._literal(arg)) | {128}
        if op is sre.ANY:
            return self.any
        if op is sre.IN:
            return self._set(arg)
        return frozenset()

    def _literal(self, code: int) -> Chars:
        if not self.fold:
            return frozenset({min(code, 128)})
        return frozenset(min(ord(c), 128) for c in {chr(code), *chr(code).lower(), *chr(code).upper()})

    def _set(self, parts: list[Any]) -> Chars:
        found: set[int] = set()
        negated = False
        for op, arg in parts:
            if op is sre.NEGATE:
                negated = True
            elif op is sre.LITERAL:
                found |= self._literal(arg)
            elif op is sre.RANGE:
                for code in range(arg[0], min(arg[1], 127) + 1):
                    found |= self._literal(code)
                found |= {128} if arg[1] > 127 else set()
            elif op is sre.CATEGORY:
                found |= _category(arg)
        return (ALL - found) | {128} if negated else frozenset(found)


_POSSESSIVE = getattr(sre, "POSSESSIVE_REPEAT", None)
_ATOMIC = getattr(sre, "ATOMIC_GROUP", None)
_REPEATS = {op for op in (sre.MAX_REPEAT, sre.MIN_REPEAT, _POSSESSIVE) if op is not None}
_GROUPS = {op for op in (sre.SUBPATTERN, _ATOMIC) if op is not None}


def _bodies(op: Any, arg: Any) -> list[list[Any]]:
    """The sequences inside an item."""
    if op in _REPEATS:
        return [list(arg[2])]
    if op is sre.BRANCH:
        return [list(b) for b in arg[1]]
    if op is sre.SUBPATTERN:
        return [list(arg[3])]
    if op is _ATOMIC and op is not None:
        return [list(arg)]
    if op in (sre.ASSERT, sre.ASSERT_NOT):
        return [list(arg[1])]
    return []


def _flat(items: list[Any]) -> list[Any]:
    """The sequence with its groups opened, which changes nothing about what it matches."""
    return list(_open(items))


def _open(items: list[Any]) -> Iterator[Any]:
    for op, arg in items:
        if op in _GROUPS:
            yield from _open(_bodies(op, arg)[0])
        else:
            yield op, arg


def _category(category: Any) -> set[int]:
    escape = {
        sre.CATEGORY_DIGIT: r"\d",
        sre.CATEGORY_NOT_DIGIT: r"\D",
        sre.CATEGORY_SPACE: r"\s",
        sre.CATEGORY_NOT_SPACE: r"\S",
        sre.CATEGORY_WORD: r"\w",
        sre.CATEGORY_NOT_WORD: r"\W",
    }[category]
    # Categories hold characters beyond ASCII as well, negated or not.
    return {code for code in range(128) if re.match(escape, chr(code))} | {128}
