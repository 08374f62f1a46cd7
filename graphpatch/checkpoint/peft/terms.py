"""What a config names, as selectors of the rule language: ends of names where it can be said so, else regexes.

PEFT's lists name modules by an end that begins behind a dot, its patterns are regexes that must reach the end of the
name. A `Term` is either; two can be intersected, which for two ends is the longer one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Union

from ...lang.formatter import format_selector
from ...lang.syntax import KEYWORDS, PathSelector, RegexSelector, Step
from ...lang.words import SEGMENT

MODULE, PARAMETER = "Module", "Parameter"
"""As classes: every module derives from the first, and the second is what the language calls a parameter."""

_PLAIN = re.compile(r"(?:[\w-]|\\\.|\\-)+")
"""A regex that stands for one text."""
_DOTTED = re.compile(r"(?:[\w-]|\\?\.|\\-)+")
"""The same, but for dots that stand for any character."""
_BEHIND_ANY_DOT = r"(?:.*\.)?(?:"
_LOOKS_BACK = re.compile(r"\^|\\[AbB]|\(\?<")


@dataclass(frozen=True)
class End:
    """All modules (or parameters) whose name is `name`, or unless `anchored` ends in it, behind a dot."""

    name: str
    anchored: bool = False
    cls: str = MODULE

    def regex(self) -> str:
        return re.escape(self.name) if self.anchored else rf"(?:.*\.)?{re.escape(self.name)}"

    def below(self, name: str) -> End:
        """The parameters of that name, of these modules."""
        return End(f"{self.name}.{name}", self.anchored, PARAMETER)

    def selector(self) -> str:
        segments = self.name.split(".")
        if any(not segment or "*" in segment or "\n" in segment for segment in segments):
            return _regex_selector(self.regex(), self.cls)
        return format_selector(PathSelector(anchored=self.anchored, steps=tuple(map(step, segments)), cls=self.cls))


def step(segment: str) -> Step:
    """A segment of a name, in quotes where it would mean something else without."""
    plain = SEGMENT.fullmatch(segment) and not set("?{}") & set(segment) and segment not in KEYWORDS
    return Step(kind="glob" if plain else "quoted", name=segment)


@dataclass(frozen=True)
class Pattern:
    """All modules (or parameters) whose whole name each of the regexes matches, and none of `unless` does."""

    regexes: tuple[str, ...]
    cls: str = MODULE
    unless: tuple[str, ...] = ()

    def regex(self, tail: str = "") -> str:
        *others, last = self.regexes
        looks = [rf"(?=(?:{one}){tail}$)" for one in others] + [rf"(?!(?:{one}){tail}$)" for one in self.unless]
        return "".join(looks) + (f"(?:{last}){tail}" if looks or tail else last)

    def below(self, name: str) -> Pattern:
        return Pattern((self.regex(rf"\.{re.escape(name)}"),), PARAMETER)

    def selector(self) -> str:
        return _regex_selector(self.regex(), self.cls)


Term = Union[End, Pattern]


def pattern_term(key: str) -> Term:
    """What a key of `rank_pattern` matches: `re.match(rf"(.*\\.)?({key})$", name)`."""
    body = key.removeprefix("^")
    if _PLAIN.fullmatch(body):
        return End(re.sub(r"\\(.)", r"\1", body), anchored=body != key)
    return Pattern((body if body != key and _DOTTED.fullmatch(body) else rf"(?:.*\.)?(?:{key})",))


def full_term(pattern: str, cls: str = MODULE) -> Pattern:
    """What a regex matches that must match the whole name."""
    # Flags at its beginning may come to stand behind other regexes.
    flags = re.match(r"\(\?([aiLmsux]+)\)", pattern)
    return Pattern((f"(?{flags[1]}:{pattern[flags.end() :]})" if flags else pattern,), cls)


def both(one: Term, other: Term) -> Term | None:
    """What is in both; None where nothing can be. The class is that of `one`."""
    if isinstance(one, End) and isinstance(other, End):
        longer, shorter = (one, other) if len(one.name) >= len(other.name) else (other, one)
        if shorter.name != longer.name:
            if shorter.anchored or not longer.name.endswith(f".{shorter.name}"):
                return None
            return End(longer.name, longer.anchored, one.cls)
        return End(one.name, one.anchored or other.anchored, one.cls)
    for end, pattern in ((one, other), (other, one)):
        if isinstance(end, End) and isinstance(pattern, Pattern):
            if end.anchored:  # it is one name, and that is decided here
                return replace(end, cls=one.cls) if re.fullmatch(pattern.regex(), end.name) else None
            if _covers(pattern, end):
                return replace(end, cls=one.cls)
    return Pattern(_together(_regexes(one), _regexes(other)), one.cls, _together(_unless(one), _unless(other)))


def less(one: Term, other: Term) -> Term | None:
    """What is in `one` and not in `other`, which has one regex; None where nothing is left."""
    shared = both(one, other)
    if shared is None:
        return one
    return None if shared == one else Pattern(_regexes(one), one.cls, (*_unless(one), *_regexes(other)))


def _unless(term: Term) -> tuple[str, ...]:
    return term.unless if isinstance(term, Pattern) else ()


def _together(one: tuple[str, ...], other: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*one, *other)))


def _regexes(term: Term) -> tuple[str, ...]:
    return term.regexes if isinstance(term, Pattern) else (term.regex(),)


def _covers(pattern: Pattern, end: End) -> bool:
    """Whether the pattern, which may begin behind any dot, matches the end itself, and so all that end in it."""
    (first, *others) = pattern.regexes
    plain = not others and not pattern.unless and not _LOOKS_BACK.search(first)
    return plain and first.startswith(_BEHIND_ANY_DOT) and re.fullmatch(first, end.name) is not None


def _regex_selector(pattern: str, cls: str) -> str:
    # A regex matches modules alone unless it is told otherwise.
    return format_selector(RegexSelector(pattern=pattern, cls=None if cls == MODULE else cls))
