"""What went wrong at a word that cannot stand where it stands, said the way the writer meant it.

`explain` tries the habits people bring from Python, CSS, YAML, C and regexes, most specific first; where none fits
`expected` says what could have stood there.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from .diagnostics import Diagnostic, did_you_mean
from .expected import clauses, unexpected
from .spot import CLAUSES, OPENING, STATEMENTS, Spot, short
from .syntax import KEYWORDS

_BEGINS = re.compile(rf"\n[ \t]*((?:{'|'.join(STATEMENTS)})[ \t]+[\w^@*:/\"'{{])")


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
        unclosed = _unclosed(spot)
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


# ── what people bring from elsewhere ─────────────────────────────────────────────────────────────────────────────────


def _json(spot: Spot) -> Diagnostic | None:
    head = spot.text.lstrip()[:1]
    if spot.start == "start" and spot.at_statement and head in "{[" and spot.text[: spot.offset].strip() == "":
        return spot.here(
            "GP111",
            "this is JSON, not a rule file",
            1,
            "RuleSet.from_json reads rules as JSON; a rule file begins with patch, use, ...",
        )
    return None


def _yaml(spot: Spot) -> Diagnostic | None:
    match = re.match(r"(-[ \t]+)?([A-Za-z_][\w-]*)[ \t]*:(?=\s)[ \t]*([^\n]*)|---|-[ \t]", spot.rest)
    if not (spot.start == "start" and spot.at_statement and match):
        return None
    return spot.here(
        "GP111",
        "this is YAML, not a rule file",
        len(match[0].rstrip()),
        "a rule is one statement: patch layers[*].**.q_proj with lora(rank=16)",
    )


def _old_keyword(spot: Spot) -> Diagnostic | None:
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


def _logic(spot: Spot) -> Diagnostic | None:
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


def _semicolon(spot: Spot) -> Diagnostic | None:
    if spot.rest[:1] != ";":
        return None
    if spot.bracket is not None and spot.bracket.type != "LBRACE":
        return spot.here("GP101", "`;` parts nothing here", 1, "write a comma")
    return spot.here("GP109", "statements need no `;`", 1, "drop it: each statement begins with its keyword")


def _slice(spot: Spot) -> Diagnostic | None:
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


def _comma(spot: Spot) -> Diagnostic | None:
    if spot.rest[:1] == "," and spot.after_selector and (spot.bracket is None or spot.bracket.type == "LBRACE"):
        return spot.here("GP107", "selectors are parted by `|`", 1, "write a | b, or {a,b} within one name")
    return None


def _child(spot: Spot) -> Diagnostic | None:
    if not (spot.after_selector or (spot.wants_selector and not spot.wants_value)):
        return None
    if spot.rest[:1] == ">" and not spot.rest.startswith(">="):
        return spot.here("GP108", "a child is written with a dot", 1, "write a.b, or a.**.b for any depth")
    if spot.rest[:1] in ("/", "\\") and spot.last is not None and spot.last.type in ("SEGMENT", "RSQB"):
        if spot.rest[:1] == "/":
            return spot.here("GP108", "a child is written with a dot", 1, "write a.b")
    if spot.rest.startswith("::"):
        return spot.here("GP108", "a child is written with a dot", 2, "write a.b")
    if spot.rest[:1] == "#" and not spot.wants_selector:
        return None
    return None


def _dots(spot: Spot) -> Diagnostic | None:
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


def _regex(spot: Spot) -> Diagnostic | None:
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


def _assignment(spot: Spot) -> Diagnostic | None:
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


def _clause(spot: Spot) -> Diagnostic | None:
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


def _statement(spot: Spot) -> Diagnostic | None:
    if not spot.at_statement or not spot.word or spot.start != "start":
        return None
    near = did_you_mean(spot.word.lower(), STATEMENTS)
    if re.match(r"\w+\s*=[^=]", spot.rest):
        near = f"write param {spot.word} = ... or alias {spot.word} = ..."
    if re.match(r"[\w.]+\(", spot.rest):
        near = near or "what to do stands behind `with`: patch SELECTOR with " + spot.word + "(...)"
    label = near or "a statement begins with use, param, alias, require, when, patch, freeze, train or map"
    return spot.here("GP125", f"no statement begins with `{spot.word}`", len(spot.word), label)


def _string(spot: Spot) -> Diagnostic | None:
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


def _braces(spot: Spot) -> Diagnostic | None:
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


def _paths(spot: Spot) -> Diagnostic | None:
    if spot.clause != "use" or not re.match(r"[./~\\-]|\w+/", spot.rest):
        return None
    start, end = spot.around
    return spot.finding("GP124", "a path stands in quotes", start, end, f'write use "{short(spot.text[start:end])}"')


def _hyphen(spot: Spot) -> Diagnostic | None:
    if spot.rest[:1] == "-" and spot.after_selector and spot.last is not None and spot.last.end_pos == spot.offset:
        start = spot.last.start_pos or 0
        name = re.match(r"[\w-]+", spot.text[start:])
        if name and spot.last.type == "SEGMENT":
            return spot.finding(
                "GP124", "a name with `-` stands in quotes", start, start + len(name[0]), f'write "{short(name[0])}"'
            )
    return None


def _arguments(spot: Spot) -> Diagnostic | None:
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


def _power(spot: Spot) -> Diagnostic | None:
    if spot.after_value and spot.rest[:1] == "^":
        return spot.here("GP101", "a power is written `**`", 1, "write **")
    if spot.rest[:1] == "$" and "VAR" in spot.expected:
        return spot.here("GP101", "`$` stands before the name of a param", 1, "write $name")
    if spot.rest[:1] == "]" and spot.last is not None and spot.last == "[" and "COLON" in spot.expected:
        return spot.here("GP101", "no index stands in these brackets", 1, "write [*] for every one")
    if spot.after_value and spot.rest[:1] == "?":
        return spot.here("GP101", "a choice is written as in Python", 1, "write x if test else y")
    return None


def _comment(spot: Spot) -> Diagnostic | None:
    if spot.rest.startswith(("//", "--", "/*", "<!--")) and (spot.at_statement or spot.after_selector):
        return spot.here("GP101", "a comment begins with `#`", 2, "write #")
    return None


def _grouping(spot: Spot) -> Diagnostic | None:
    if spot.rest[:1] == "(" and spot.wants_selector and not spot.wants_value:
        return spot.here(
            "GP101",
            "selectors are not grouped with parentheses",
            1,
            "write the branches whole, a.b | a.c, or use {b,c}",
        )
    return None


def _number(spot: Spot) -> Diagnostic | None:
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


def _unclosed_finding(spot: Spot) -> Diagnostic | None:
    """A bracket that is still open where a statement begins or the text ends."""
    if spot.rest == "" or spot.word in STATEMENTS or spot.word in CLAUSES or spot.rest[:1] in (")", "]", "}"):
        return _unclosed(spot)
    return None


def _unclosed(spot: Spot) -> Diagnostic | None:
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


def _stray(spot: Spot) -> Diagnostic | None:
    close = spot.rest[:1]
    if close in (")", "]", "}") and close and (spot.bracket is None or OPENING[spot.bracket.type][1] != close):
        opening = {")": "(", "]": "[", "}": "{"}[close]
        return spot.here("GP103", f"`{close}` closes nothing", 1, f"no `{opening}` is open here")
    return None


_HABITS: tuple[Callable[[Spot], Diagnostic | None], ...] = (
    _json,
    _yaml,
    _semicolon,
    _string,
    _slice,
    _unclosed_finding,
    _stray,
    _old_keyword,
    _logic,
    _comma,
    _comment,
    _paths,
    _child,
    _dots,
    _hyphen,
    _regex,
    _grouping,
    _braces,
    _assignment,
    _arguments,
    _power,
    _number,
    _clause,
    _statement,
)
