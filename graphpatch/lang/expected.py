"""What could have stood where something else stands, in the words of the language and never in those of the parser."""

from __future__ import annotations

from .diagnostics import Diagnostic
from .spot import CLAUSES, STATEMENTS, Spot


def unexpected(spot: Spot) -> Diagnostic:
    wanted = _wanted(spot)
    if spot.rest.strip() == "":
        last = spot.last
        start = last.start_pos if last is not None and last.start_pos is not None else 0
        end = last.end_pos if last is not None and last.end_pos is not None else len(spot.text)
        return spot.finding(
            "GP101",
            "the text ends in the middle of a statement" if spot.start == "start" else "something is missing",
            start,
            end,
            f"expected {wanted} behind this",
        )
    found = spot.word or spot.rest[:1]
    return spot.here("GP101", f"`{found}` cannot stand here", len(found), f"expected {wanted}")


def _wanted(spot: Spot) -> str:
    """What could have stood here, in the words of the language."""
    expected = spot.expected
    parts: list[str] = []
    if spot.wants_value:
        parts.append("a value")
    elif "INT" in expected and "COLON" in expected:
        parts.append("an index, a slice such as 0:12, or `*`")
    elif "INT" in expected:
        parts.append("an integer, $name or (expression)")
    elif "ROOT" in expected:
        parts.append("a selector")
    elif "SEGMENT" in expected:
        parts.append("a name")
    elif "DOTTED" in expected:
        parts.append("a packaged name or a path in quotes" if spot.clause == "use" else "the name of an op")
    elif "NAME" in expected:
        parts.append("a name")
    elif "CLASS" in expected:
        parts.append("the name of a class")
    if spot.after_value:
        parts.append("an operator")
    signs = {
        "VBAR": "|",
        "DOT": ".",
        "EQUAL": "=",
        "COMMA": ",",
        "RPAR": ")",
        "RSQB": "]",
        "RBRACE": "}",
        "LPAR": "(",
        "LBRACE": "{",
        "__ANON_0": "->",
        "ELSE": "else",
    }
    if not parts and "IN" in expected:
        parts.append("`in`")
    # What goes on with a value is "an operator", what may open one is "a value".
    hidden = {"VBAR", "DOT", "EQUAL", "LPAR"} if spot.after_value else {"LPAR"} if "INT" in expected else set()
    parts += [f"`{sign}`" for name, sign in signs.items() if name in expected and name not in hidden]
    if "WITH" in expected or "WHERE" in expected:
        parts.append(
            "a clause (" + ", ".join(w for w in CLAUSES if w.upper() in expected and w not in ("then", "per")) + ")"
        )
    if spot.at_statement:
        parts.append("a statement (" + ", ".join(w for w in STATEMENTS if w.upper() in expected) + ")")
    elif "PATCH" in expected:
        parts.append("the next statement")
    return " or ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts) or "the end"


def clauses(spot: Spot) -> str:
    return "the clauses are " + ", ".join(w for w in CLAUSES if w.upper() in spot.expected)
