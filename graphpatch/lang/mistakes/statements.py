"""Files of another kind, and words that begin no statement or clause."""

from __future__ import annotations

import re

from ..diagnostics import Diagnostic, did_you_mean
from ..expected import clauses
from ..spot import CLAUSES, STATEMENTS, Spot, short
from ..syntax import KEYWORDS


def json(spot: Spot) -> Diagnostic | None:
    head = spot.text.lstrip()[:1]
    if spot.start == "start" and spot.at_statement and head in "{[" and spot.text[: spot.offset].strip() == "":
        return spot.here(
            "GP111",
            "this is JSON, not a rule file",
            1,
            "RuleSet.from_json reads rules as JSON; a rule file begins with patch, use, ...",
        )
    return None


def yaml(spot: Spot) -> Diagnostic | None:
    match = re.match(r"(-[ \t]+)?([A-Za-z_][\w-]*)[ \t]*:(?=\s)[ \t]*([^\n]*)|---|-[ \t]", spot.rest)
    if not (spot.start == "start" and spot.at_statement and match):
        return None
    return spot.here(
        "GP111",
        "this is YAML, not a rule file",
        len(match[0].rstrip()),
        "a rule is one statement: patch layers[*].**.q_proj with lora(rank=16)",
    )


def old_keyword(spot: Spot) -> Diagnostic | None:
    if spot.word == "else" or spot.word == "elif":
        if spot.at_statement:
            return spot.here(
                "GP110",
                f"there is no `{spot.word}`",
                4,
                "write a second `when` with the opposite test: when not ... { }",
            )
        if spot.after_value:
            return spot.here("GP110", "`else` without `if`", 4, "write x if test else y")
    if not spot.at_statement:
        return None
    meant = {
        "if": "when",
        "import": "use",
        "include": "use",
        "from": "use",
        "let": "param",
        "var": "param",
        "set": "param",
        "def": "alias",
        "assert": "require",
        "apply": "patch",
        "replace": "patch",
        "unfreeze": "train",
        "rename": "map",
        "with": "patch",
        "match": "patch",
        "select": "patch",
    }.get(spot.word.lower())
    if meant:
        return spot.here(
            "GP125", f"a statement cannot begin with `{spot.word}`", len(spot.word), f"did you mean `{meant}`?"
        )
    if spot.word in ("use", "param", "alias"):
        return spot.here(
            "GP130",
            f"`{spot.word}` cannot depend on a `when`",
            len(spot.word),
            "move it out of the braces, to the top of the file",
        )
    return None


def semicolon(spot: Spot) -> Diagnostic | None:
    if spot.rest[:1] != ";":
        return None
    if spot.bracket is not None and spot.bracket.type != "LBRACE":
        return spot.here("GP101", "`;` parts nothing here", 1, "write a comma")
    return spot.here("GP109", "statements need no `;`", 1, "drop it: each statement begins with its keyword")


def comment(spot: Spot) -> Diagnostic | None:
    if spot.rest.startswith(("//", "--", "/*", "<!--")) and (spot.at_statement or spot.after_selector):
        return spot.here("GP101", "a comment begins with `#`", 2, "write #")
    return None


def paths(spot: Spot) -> Diagnostic | None:
    if spot.clause != "use" or not re.match(r"[./~\\-]|\w+/", spot.rest):
        return None
    start, end = spot.around
    return spot.finding("GP124", "a path stands in quotes", start, end, f'write use "{short(spot.text[start:end])}"')


def clause(spot: Spot) -> Diagnostic | None:
    """A word where a clause, an operator or the next statement should begin."""
    word = spot.word
    if not word or not ("WITH" in spot.expected or "WHERE" in spot.expected or "PER" in spot.expected):
        return None
    if spot.bracket is not None and spot.bracket.type != "LBRACE":
        return None
    near = did_you_mean(word, [k.lower() for k in spot.expected if k.lower() in (*CLAUSES, *STATEMENTS)])
    called = spot.rest[len(word) :].lstrip()[:1] == "("
    if "WITH" in spot.expected and called and "with" not in near and not any(t == "with" for t in spot.words):
        name = re.match(r"[\w.]+", spot.rest)
        return spot.here(
            "GP115", "`with` is missing", len(name[0] if name else word), f"write with {name[0] if name else word}(...)"
        )
    if spot.clause == "expect" and word in ("at", "in", "of", "for", "each", "every"):
        return spot.here(
            "GP125", f"`{word}` has no meaning here", len(word), "write expect 4 per layers[*], or expect >= 4"
        )
    if word in ("and", "or", "not", "but") and spot.after_selector:
        return spot.here(
            "GP106",
            f"selectors have no `{word}`",
            len(word),
            "write | for any of, `except` for all but; `where` tests more about a module",
        )
    if near:
        return spot.here("GP125", f"no clause is called `{word}`", len(word), near)
    if word in STATEMENTS or word in KEYWORDS:
        return None
    if spot.after_selector:
        return spot.here(
            "GP125",
            f"no clause is called `{word}`",
            len(word),
            f"a module below is written with a dot: ... .**.{word}",
            clauses(spot),
        )
    return spot.here("GP125", f"no clause is called `{word}`", len(word), clauses(spot))


def statement(spot: Spot) -> Diagnostic | None:
    if not spot.at_statement or not spot.word or spot.start != "start":
        return None
    near = did_you_mean(spot.word.lower(), STATEMENTS)
    if re.match(r"\w+\s*=[^=]", spot.rest):
        near = f"write param {spot.word} = ... or alias {spot.word} = ..."
    if re.match(r"[\w.]+\(", spot.rest):
        near = near or "what to do stands behind `with`: patch SELECTOR with " + spot.word + "(...)"
    label = near or "a statement begins with use, param, alias, require, when, patch, freeze, train or map"
    return spot.here("GP125", f"no statement begins with `{spot.word}`", len(spot.word), label)
