"""Where reading stopped, and what can be said about that place."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lark import Token

from .diagnostics import Diagnostic, Place, Source, Span

STATEMENTS = ("use", "param", "alias", "require", "when", "patch", "freeze", "train", "map")
CLAUSES = ("with", "then", "where", "except", "expect", "per", "as", "overrides", "using")
OPENING = {"LPAR": ("(", ")"), "LSQB": ("[", "]"), "LBRACE": ("{", "}")}
_CLOSING = {"RPAR": "LPAR", "RSQB": "LSQB", "RBRACE": "LBRACE"}


@dataclass(frozen=True)
class Spot:
    """Where reading stopped."""

    source: Source
    offset: int
    expected: set[str]
    """The grammar's names of what could have stood here."""
    words: list[Token]
    """The words of the unfinished statement that are not yet part of something."""
    last: Token | None
    """The word before."""
    start: str

    @property
    def text(self) -> str:
        return self.source.text

    @property
    def rest(self) -> str:
        return self.text[self.offset : self.offset + 200]

    @property
    def word(self) -> str:
        match = re.match(r"[A-Za-z_]\w*", self.rest)
        return match[0] if match else ""

    @property
    def chunk(self) -> str:
        """What stands here up to the next space."""
        match = re.match(r"\S+", self.rest)
        return match[0] if match else ""

    @property
    def around(self) -> tuple[int, int]:
        """The run of characters without a space that this spot is in."""
        start = self.offset
        while start > 0 and not self.text[start - 1].isspace() and self.offset - start < 200:
            start -= 1
        return start, self.offset + len(self.chunk)

    @property
    def statement(self) -> str:
        """The keyword of the statement we are in."""
        return next((str(t) for t in reversed(self.words) if t in STATEMENTS and t.type.lower() == t), "")

    @property
    def clause(self) -> str:
        """The keyword of the clause or statement that was last begun."""
        known = (*STATEMENTS, *CLAUSES)
        return next((str(t) for t in reversed(self.words) if t in known and t.type.lower() == t), "")

    @property
    def bracket(self) -> Token | None:
        """The innermost bracket that is open."""
        closed: list[str] = []
        for token in reversed(self.words):
            if token.type in _CLOSING:
                closed.append(_CLOSING[token.type])
            elif token.type in OPENING:
                if closed and closed[-1] == token.type:
                    closed.pop()
                else:
                    return token
        return None

    @property
    def at_statement(self) -> bool:
        return "PATCH" in self.expected and "WITH" not in self.expected and "VBAR" not in self.expected

    @property
    def wants_value(self) -> bool:
        return "DOTTED" in self.expected and "INT" in self.expected

    @property
    def wants_selector(self) -> bool:
        return "SEGMENT" in self.expected

    @property
    def after_selector(self) -> bool:
        return "VBAR" in self.expected

    @property
    def after_value(self) -> bool:
        return "TIMES" in self.expected

    def span(self, start: int, end: int) -> Span:
        text = self.text
        end = max(end, start + 1)
        return Span(*_position(text, start), *_position(text, min(end, len(text)) if start < len(text) else end))

    def finding(self, code: str, title: str, start: int, end: int, label: str, *fixes: str) -> Diagnostic:
        return Diagnostic(code, title, (Place(self.source, self.span(start, end), label),), fixes=fixes)

    def here(self, code: str, title: str, length: int, label: str, *fixes: str) -> Diagnostic:
        return self.finding(code, title, self.offset, self.offset + length, label, *fixes)


def _position(text: str, offset: int) -> tuple[int, int]:
    return text.count("\n", 0, offset) + 1, offset - text.rfind("\n", 0, offset)


def short(text: str) -> str:
    """A quotation of at most eighty characters."""
    return text if len(text) <= 80 else text[:77] + "..."
