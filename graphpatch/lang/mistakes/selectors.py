"""Selectors written as regexes, CSS paths, ranges and lists are written elsewhere."""

from __future__ import annotations

import re

from ..diagnostics import Diagnostic
from ..spot import Spot, short


def slice(spot: Spot) -> Diagnostic | None:
    bracket = spot.bracket
    if bracket is None or bracket.type != "LSQB" or bracket.start_pos is None:
        return None
    inside = re.match(
        r"\[\s*(-?\d*)\s*(\.\.\.?=?|-|\bto\b|\u2013|~)\s*(-?\d*)\s*(?=[\],])", spot.text[bracket.start_pos :][:80]
    )
    if not inside or not (inside[1] or inside[3]):
        return None
    start, stop = bracket.start_pos + 1, bracket.start_pos + inside.end()
    while spot.text[start].isspace():
        start += 1
    first, last = inside[1], inside[3]
    if re.fullmatch(r"\d{1,9}", last):
        count = int(last) + 1
        label = f"write {first}:{count}"
        label += f" for the first {_NUMBERS.get(count, count)}" if first in ("", "0") else f" for {first} to {last}"
        label += " (the end is not included, as in Python)"
    else:
        label = f"write {first}:{last} (the end is not included, as in Python)"
    return spot.finding("GP104", "a slice is written with a colon", start, stop, label)


_NUMBERS = dict(enumerate("none one two three four five six seven eight nine ten eleven twelve".split()))


def comma(spot: Spot) -> Diagnostic | None:
    if spot.rest[:1] == "," and spot.after_selector and (spot.bracket is None or spot.bracket.type == "LBRACE"):
        return spot.here("GP107", "selectors are parted by `|`", 1, "write a | b, or {a,b} within one name")
    return None


def child(spot: Spot) -> Diagnostic | None:
    if not (spot.after_selector or (spot.wants_selector and not spot.wants_value)):
        return None
    if spot.rest[:1] == ">" and not spot.rest.startswith(">="):
        return spot.here("GP108", "a child is written with a dot", 1, "write a.b, or a.**.b for any depth")
    if spot.rest[:1] == "/" and spot.last is not None and spot.last.type in ("SEGMENT", "RSQB"):
        return spot.here("GP108", "a child is written with a dot", 1, "write a.b")
    if spot.rest.startswith("::"):
        return spot.here("GP108", "a child is written with a dot", 2, "write a.b")
    return None


def dots(spot: Spot) -> Diagnostic | None:
    if spot.last is not None and spot.last.type == "ROOT" and spot.rest[:1] == "[":
        inside = re.match(r"\[\s*([\w, ]+?)\s*\]", spot.rest)
        names = (re.sub(r"\s+", "", inside[1]) if inside else "") or "0,1,2"
        written = f"^{{{names}}}" if "," in names else f"^{names}"
        return spot.here("GP101", "the root has no name that could take an index", 1, f"write {short(written)}")
    if spot.last is not None and spot.last.type == "ROOT" and spot.rest[:1].isalnum():
        return spot.here(
            "GP101", "`^` stands right before a name", len(spot.word) or 1, f"write ^{spot.word}, without a space"
        )
    if (
        spot.wants_selector
        and not spot.wants_value
        and spot.rest[:1] == "["
        and spot.last is not None
        and spot.last == "."
    ):
        return spot.finding(
            "GP101",
            "an index follows its name without a dot",
            spot.offset - 1,
            spot.offset + 1,
            "write layers[0], not layers.[0]",
        )
    if spot.last is not None and spot.last == "." and spot.rest[:1] == "." and spot.wants_selector:
        return spot.here("GP101", "two dots in a row", 1, "write a.b for a child, a.**.b for any depth")
    return None


def hyphen(spot: Spot) -> Diagnostic | None:
    if spot.rest[:1] == "-" and spot.after_selector and spot.last is not None and spot.last.end_pos == spot.offset:
        start = spot.last.start_pos or 0
        name = re.match(r"[\w-]+", spot.text[start:])
        if name and spot.last.type == "SEGMENT":
            return spot.finding(
                "GP124", "a name with `-` stands in quotes", start, start + len(name[0]), f'write "{short(name[0])}"'
            )
    return None


def regex(spot: Spot) -> Diagnostic | None:
    if not (spot.wants_selector or spot.after_selector) or spot.wants_value:
        return None
    start, end = spot.around
    run = spot.text[start:end]
    if spot.rest[:1] not in ("\\", "(", "$", "+", ".", ")", "[", "]") and not re.search(r"\\[.dwsDWS]", run):
        return None
    if spot.rest[:1] == "/" or run.startswith("/"):
        return None
    if spot.rest[:1] in ("(", ")") and spot.after_selector and not re.search(r"\(\w+(\|\w+)+\)|\\|\(\?", run):
        return None
    if spot.rest[:1] in ("[", "]") and not re.search(r"\\|\(|\$$|\]\+|\]\*", run):
        return None
    if spot.rest[:1] == "." and not re.match(r"\.[*+]|\.\\", spot.rest):
        return None
    choice = re.fullmatch(r"(?:\.\*\\?\.?)?((?:\w+\.)*\w*)\((?:\?:)?(\w+(?:\|\w+)+)\)(\w*)\$?", run)
    if choice:
        plain = f"{choice[1]}{{{choice[2].replace('|', ',')}}}{choice[3]}"
        return spot.finding("GP114", "alternatives within a name stand in braces", start, end, f"write {plain}")
    simple = re.fullmatch(r"(?:\.\*)?(?:\\?\.)?([\w.]+)\$?", run)
    if simple and run[-1:] in "$" + simple[1][-1:]:
        return spot.finding(
            "GP114",
            "a selector is no regex",
            start,
            end,
            f"write {simple[1]}: the left end is open and the right end fixed anyway",
        )
    return spot.finding(
        "GP114", "a regex stands between slashes", start, end, f"write /{short(run)}/; it matches the whole name"
    )
