"""What graphpatch says when something is wrong: where, what, why, and what to do.

A :class:`Diagnostic` is data. :class:`Error` carries one or many, and its text is what the user reads.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal, NamedTuple

Severity = Literal["error", "warning", "style"]


class Span(NamedTuple):
    """A stretch of source text: 1-based lines and columns, the end column exclusive."""

    line: int
    column: int
    end_line: int
    end_column: int


@dataclass(frozen=True)
class Source:
    """A named text that spans point into: a rule file, a selector of the command line, a `.tree` file."""

    name: str
    text: str

    def line(self, number: int) -> str:
        lines = self.text.split("\n")
        return lines[number - 1].rstrip("\r") if 0 < number <= len(lines) else ""


@dataclass(frozen=True)
class Place:
    """A span in a source, with the words that stand behind its caret."""

    source: Source
    span: Span
    label: str = ""

    def __str__(self) -> str:
        return f"{self.source.name}:{self.span.line}:{self.span.column}"


@dataclass(frozen=True)
class Diagnostic:
    """One finding.

    `code` is `GPnnn` (1xx parse, 2xx names, arguments, types, 3xx style, 4xx against a tree, 5xx applying);
    `places` are quoted with a caret each, first the one to look at; `text` is prose that stands under the title;
    `fixes` are the lines that say what to do.
    """

    code: str
    title: str
    places: tuple[Place, ...] = ()
    text: tuple[str, ...] = ()
    fixes: tuple[str, ...] = ()
    severity: Severity = "error"

    def render(self, color: bool = False) -> str:
        """The finding as a block of lines; `color` adds ANSI colours and changes nothing else."""
        paint = _COLORS[self.severity] if color else ""
        reset = _RESET if color else ""
        lines = [f"{paint}{self.severity} {self.code}{reset}: {self.title}"]
        for place in self.places:
            lines += _quote(place, paint, reset)
        lines += [f"  {line}" for line in self.text]
        lines += [f"  = {line}" for line in self.fixes]
        return "\n".join(lines)

    def to_json(self) -> dict[str, object]:
        return {
            "code": self.code,
            "severity": self.severity,
            "title": self.title,
            "places": [{"file": p.source.name, "span": list(p.span), "label": p.label} for p in self.places],
            "text": list(self.text),
            "fixes": list(self.fixes),
        }


_RESET = "\x1b[0m"
_COLORS = {"error": "\x1b[1;31m", "warning": "\x1b[1;33m", "style": "\x1b[1;36m"}
_WIDEST = 160
"""A quoted line longer than this is cut around its caret, so a one-line file of megabytes stays readable."""


def _quote(place: Place, paint: str, reset: str) -> list[str]:
    span, number = place.span, str(place.span.line)
    text = place.source.line(span.line)
    first = min(span.column - 1, len(text))
    last = span.end_column - 1 if span.end_line == span.line else len(text)
    if len(text) > _WIDEST:
        start = max(0, first - _WIDEST // 2)
        text = ("..." if start else "") + text[start : start + _WIDEST] + "..."
        shift = start - (3 if start else 0)
        first, last = first - shift, min(last - shift, len(text))
    # Tabs keep their width in the caret line, whatever the terminal takes a tab to be.
    pad = "".join("\t" if c == "\t" else " " for c in text[:first])
    caret = "^" * max(1, last - first)
    gutter = " " * len(number)
    behind = f" {place.label}" if place.label else ""
    return [f"{gutter} --> {place}", f"{number} | {text}", f"{gutter} | {pad}{paint}{caret}{reset}{behind}"]


class Error(Exception):
    """Every refusal of graphpatch: `diagnostics` holds what was found, `str()` is what the user reads."""

    def __init__(self, diagnostics: Diagnostic | Iterable[Diagnostic]):
        one = isinstance(diagnostics, Diagnostic)
        self.diagnostics: tuple[Diagnostic, ...] = (diagnostics,) if one else tuple(diagnostics)  # type: ignore[arg-type,assignment]
        super().__init__(self.diagnostics)

    def __str__(self) -> str:
        return "\n\n".join(d.render() for d in self.diagnostics)

    @property
    def code(self) -> str:
        """The code of the first finding."""
        return self.diagnostics[0].code


class RuleError(Error):
    """The rule file is wrong by itself (GP1xx, GP2xx)."""


class PlanError(Error):
    """The rules do not fit this tree (GP4xx)."""


class ApplyError(Error):
    """The model cannot be changed, or changed back, as asked (GP5xx)."""


def refusal(code: str, title: str, *fixes: str, text: tuple[str, ...] = ()) -> ApplyError:
    """An `ApplyError` of one finding that has no place in a rule file."""
    return ApplyError(Diagnostic(code, title, text=text, fixes=fixes))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`did you mean \\`rank\\`?`, or an empty string where nothing known is near."""
    near = get_close_matches(word, sorted(set(known)), n=1, cutoff=0.6)
    return f"did you mean `{near[0]}`?" if near else ""
