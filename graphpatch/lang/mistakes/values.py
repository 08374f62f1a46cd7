"""Values, arguments and tests written as in C, JSON or a shell."""

from __future__ import annotations

import re

from ..diagnostics import Diagnostic
from ..spot import Spot, short
from ..syntax import KEYWORDS


def logic(spot: Spot) -> Diagnostic | None:
    rest = spot.rest
    for sign, word in (("&&", "and"), ("||", "or")):
        if rest.startswith(sign) or (
            sign == "||" and rest.startswith("|") and spot.text[spot.offset - 1 : spot.offset] == "|"
        ):
            start = spot.offset - (0 if rest.startswith(sign) else 1)
            if sign == "||" and (spot.wants_selector or spot.after_selector):
                return spot.finding("GP106", "`||` is written `|` between selectors", start, start + 2, "write |")
            if sign == "&&" and spot.after_selector:
                return spot.finding(
                    "GP106",
                    "selectors have no `and`",
                    start,
                    start + 2,
                    "`|` is any of; `where` tests more about a module",
                )
            return spot.finding("GP106", f"`{sign}` is written `{word}`", start, start + 2, f"write {word}")
    if rest[:1] == "&" and (spot.after_value or spot.after_selector):
        return spot.here("GP106", "`&` is written `and`", 1, "write and")
    if rest[:1] == "|" and spot.after_value and not spot.after_selector:
        return spot.here("GP106", "`|` is written `or` between values", 1, "write or")
    if rest[:1] in ("!", "~") and not rest.startswith("!="):
        if spot.wants_selector and not spot.wants_value:
            return spot.here("GP106", "a selector has no `not`", 1, "select more, and leave these out with `except`")
        return spot.here("GP106", f"`{rest[0]}` is written `not`", 1, "write not")
    return None


def assignment(spot: Spot) -> Diagnostic | None:
    rest, last = spot.rest, spot.last
    if spot.statement == "map" and re.match(r"=>?|-+>|:", rest) and "__ANON_0" in spot.expected:
        return spot.here("GP112", "a key goes to another with `->`", 2 if rest[1:2] == ">" else 1, "write ->")
    if spot.statement == "patch" and spot.after_selector and rest.startswith(("->", "=>")):
        return spot.here("GP115", "what to do stands behind `with`", 2, "write with")
    if spot.statement == "patch" and rest[:1] == "(" and last is not None and last.type == "CLASS":
        start = last.start_pos or 0
        return spot.finding(
            "GP115", "what to do stands behind `with`", start - 1, spot.offset, f"write with {last}(...)"
        )
    if rest[:1] != "=":
        return None
    if last == "==":
        return spot.finding("GP112", "`===` is written `==`", spot.offset - 2, spot.offset + 1, "write ==")
    if (
        spot.bracket is not None
        and spot.bracket.type == "LPAR"
        and last is not None
        and last.type == "DOTTED"
        and "." in last
    ):
        return spot.finding(
            "GP112", "the name of an argument has no dot", last.start_pos or 0, spot.offset, "write name=value"
        )
    if rest.startswith("=!"):
        return spot.here("GP112", "`=!` is written `!=`", 2, "write !=")
    if spot.clause == "expect":
        return spot.here("GP112", "`expect` compares with `==`", 1, "write the number alone: expect 4")
    if spot.after_value:
        return spot.here("GP112", "`=` gives a value, `==` compares", 1, "write ==")
    if spot.statement == "patch" and spot.after_selector:
        return spot.here("GP115", "what to do stands behind `with`", 1, "write with")
    return None


def arguments(spot: Spot) -> Diagnostic | None:
    """`with lora rank=16`, `lora{rank: 16}`, `lora(rank: 16)`."""
    rest, last = spot.rest, spot.last
    if last is None:
        return None
    in_call = spot.bracket is not None and spot.bracket.type == "LPAR"
    if in_call and rest[:1] == ":" and last.type == "DOTTED":
        return spot.here("GP112", "an argument is given with `=`", 1, f"write {last}=...")
    if in_call and spot.after_value and (spot.word or (rest[:1] in "\"'$" and rest[:1])) and spot.word not in KEYWORDS:
        return spot.here("GP101", "a comma is missing", 1, f"write a comma before {short(spot.chunk)}")
    if last.type == "DOTTED" and spot.clause in ("with", "then", "using") and "LPAR" in spot.expected:
        if re.match(r"\w+\s*=[^=]", rest) or rest[:1] in ("{", "[", ":"):
            return spot.here(
                "GP101", "arguments stand in parentheses", len(spot.word) or 1, f"write {last}(name=value)"
            )
    return None


def power(spot: Spot) -> Diagnostic | None:
    if spot.after_value and spot.rest[:1] == "^":
        return spot.here("GP101", "a power is written `**`", 1, "write **")
    if spot.rest[:1] == "$" and "VAR" in spot.expected:
        return spot.here("GP101", "`$` stands before the name of a param", 1, "write $name")
    if spot.rest[:1] == "]" and spot.last is not None and spot.last == "[" and "COLON" in spot.expected:
        return spot.here("GP101", "no index stands in these brackets", 1, "write [*] for every one")
    if spot.after_value and spot.rest[:1] == "?":
        return spot.here("GP101", "a choice is written as in Python", 1, "write x if test else y")
    return None


def number(spot: Spot) -> Diagnostic | None:
    match = re.match(r"[0-9][\w.]*", spot.rest)
    if not match:
        return None
    if "NAME" in spot.expected and not spot.wants_selector:
        return spot.here("GP120", "a name begins with a letter", len(match[0]), "put a letter before it")
    if spot.wants_value or "INT" in spot.expected:
        if re.fullmatch(r"0[xXoObB][0-9A-Fa-f_]+", match[0]) and len(match[0]) < 20:
            return spot.here("GP120", "numbers are written in decimal", len(match[0]), f"write {int(match[0], 0)}")
        return spot.here(
            "GP120",
            f"`{short(match[0])}` is no {'number' if spot.wants_value else 'index'}",
            len(match[0]),
            "a name that begins with a digit stands in quotes",
        )
    return None
