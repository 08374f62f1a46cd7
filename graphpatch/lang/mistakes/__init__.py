"""What went wrong at a word that cannot stand where it stands, said the way the writer meant it.

`explain` tries the habits people bring from Python, CSS, YAML, C and regexes, most specific first; where none fits
`expected` says what could have stood there.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from ..diagnostics import Diagnostic
from ..expected import unexpected
from ..spot import CLAUSES, OPENING, STATEMENTS, Spot, short
from . import brackets, selectors, statements, values

_BEGINS = re.compile(rf"\n[ \t]*((?:{'|'.join(STATEMENTS)})[ \t]+[\w^@*:/\"'{{])")
_HABITS: tuple[Callable[[Spot], Diagnostic | None], ...] = (
    statements.json,
    statements.yaml,
    statements.semicolon,
    brackets.string,
    selectors.slice,
    brackets.unclosed_finding,
    brackets.stray,
    statements.old_keyword,
    values.logic,
    selectors.comma,
    statements.comment,
    statements.paths,
    selectors.child,
    selectors.dots,
    selectors.hyphen,
    selectors.regex,
    brackets.grouping,
    brackets.braces,
    values.assignment,
    values.arguments,
    values.power,
    values.number,
    statements.clause,
    statements.statement,
)
"""From the most specific to the least: the first that recognises itself speaks."""


def explain(spot: Spot) -> tuple[Diagnostic, int]:
    """What is wrong, and the offset from which a next statement is to be looked for."""
    bracket = spot.bracket
    if bracket is not None and bracket.type != "LBRACE" and bracket.end_pos is not None:
        # A statement that begins a line was not meant to be in the brackets that a line before left open.
        begun = re.search(_BEGINS, spot.text[bracket.end_pos : spot.offset])
        if begun:
            sign, close = OPENING[bracket.type]
            title, start = f"`{sign}` is never closed", bracket.end_pos - 1
            return spot.finding(
                "GP103", title, start, start + 1, f"a `{close}` is missing"
            ), bracket.end_pos + begun.start(1)
    if _swallowed(spot):
        assert spot.last is not None and spot.last.start_pos is not None
        start = spot.last.start_pos
        unclosed = brackets.unclosed(spot)
        if unclosed is not None:
            return unclosed, start
        wanted = {"SEGMENT": "a selector", "NAME": "a name", "CLASS": "a class"}.get(spot.last.type, "a value")
        before = re.search(r"(\S+)\s*$", spot.text[:start])
        title = f"{wanted} is missing" + (f" after `{short(before[1])}`" if before else "")
        label = f"`{spot.last}` begins the next part"
        return spot.finding("GP101", title, start, start + len(spot.last), label), start
    for habit in _HABITS:
        finding = habit(spot)
        if finding is not None:
            resume = spot.offset + (1 if finding.code == "GP109" else 0)
            return finding, resume
    return unexpected(spot), spot.offset


def _swallowed(spot: Spot) -> bool:
    """Whether the word before was taken for a name, and was meant as the keyword it is."""
    last = spot.last
    if last is None or last.type not in ("SEGMENT", "DOTTED", "NAME", "CLASS") or last.end_pos is None:
        return False
    if last not in (*STATEMENTS, *CLAUSES) or spot.text[last.end_pos : last.end_pos + 1] not in (" ", "\t", "\n", "\r"):
        return False
    # A name that happens to be a keyword is followed by what may follow a name.
    return bool(spot.word or (spot.rest[:1] in "\"'@^0123456789:{" and spot.rest[:1]))
