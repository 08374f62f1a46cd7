"""Brackets, braces and quotes that are not closed, not open, or hold what they cannot."""

from __future__ import annotations

import re

from ..diagnostics import Diagnostic
from ..spot import CLAUSES, OPENING, STATEMENTS, Spot, short


def string(spot: Spot) -> Diagnostic | None:
    quote = spot.rest[:1]
    if quote in ("\u201c", "\u201d", "\u2018", "\u2019", "`"):
        return spot.here(
            "GP102",
            f"`{quote}` is no quote of the language" if quote != "`" else "a backtick quotes nothing",
            1,
            'write "',
        )
    if quote in ("'", '"') and quote:
        line = spot.text[spot.offset :].split("\n", 1)[0].rstrip("\r")
        if not re.match(r'"(?:\\.|[^"\\])*"' if quote == '"' else r"'(?:\\.|[^'\\])*'", line):
            return spot.finding(
                "GP102",
                "this string is never closed",
                spot.offset,
                spot.offset + len(line),
                f"close it with {quote} on the same line",
            )
    return None


def unclosed_finding(spot: Spot) -> Diagnostic | None:
    """A bracket that is still open where a statement begins or the text ends."""
    if spot.rest == "" or spot.word in STATEMENTS or spot.word in CLAUSES or spot.rest[:1] in (")", "]", "}"):
        return unclosed(spot)
    return None


def unclosed(spot: Spot) -> Diagnostic | None:
    bracket = spot.bracket
    if bracket is None or bracket.start_pos is None:
        return None
    if bracket.type == "LBRACE" and (spot.rest != "" or "RBRACE" not in spot.expected):
        return None
    sign, close = OPENING[bracket.type]
    if spot.rest[:1] == close:
        return None
    start = bracket.start_pos
    return spot.finding("GP103", f"`{sign}` is never closed", start, start + 1, f"a `{close}` is missing")


def stray(spot: Spot) -> Diagnostic | None:
    close = spot.rest[:1]
    if close in (")", "]", "}") and close and (spot.bracket is None or OPENING[spot.bracket.type][1] != close):
        opening = {")": "(", "]": "[", "}": "{"}[close]
        return spot.here("GP103", f"`{close}` closes nothing", 1, f"no `{opening}` is open here")
    return None


def grouping(spot: Spot) -> Diagnostic | None:
    if spot.rest[:1] == "(" and spot.wants_selector and not spot.wants_value:
        return spot.here(
            "GP101",
            "selectors are not grouped with parentheses",
            1,
            "write the branches whole, a.b | a.c, or use {b,c}",
        )
    return None


def braces(spot: Spot) -> Diagnostic | None:
    if spot.rest[:1] != "{" or not (spot.wants_selector or "CLASS" in spot.expected):
        if (
            spot.rest[:1] == "{"
            and spot.last is not None
            and spot.bracket is None
            and spot.after_selector
            and "SEGMENT" not in spot.expected
        ):
            line = re.match(r"\{[^}\n]*\}", spot.rest)
            if line and spot.last.end_pos == spot.offset:
                return _bad_braces(spot, line[0])
        return None
    body = re.match(r"\{[^}]*\}", spot.rest)
    if not body:
        return spot.here("GP103", "`{` is never closed", 1, "write {a,b} with a closing brace")
    return _bad_braces(spot, body[0])


def _bad_braces(spot: Spot, body: str) -> Diagnostic:
    if re.search(r"\{\s*\}|\{\s*,|,\s*,|,\s*\}", body):
        return spot.here(
            "GP126",
            "an alternative in braces is empty",
            len(body),
            "write {a,b}; for a part that may be absent write two selectors with |",
        )
    if re.fullmatch(r"\{\s*\d+\s*(\.\.|-|:)\s*\d+\s*\}", body):
        return spot.here("GP104", "a range of indices stands in brackets", len(body), "write layers[0:12]")
    if "{" in body[1:]:
        return spot.here("GP126", "braces cannot stand in braces", len(body), "write all alternatives in one pair")
    if "|" in body:
        return spot.here(
            "GP126", "alternatives in braces are parted by commas", len(body), f"write {short(body.replace('|', ','))}"
        )
    return spot.here("GP126", "braces hold names, parted by commas", len(body), "write {q,k,v}_proj")
