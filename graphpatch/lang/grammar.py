"""The parser tables: read from the compiled form where it fits, else made from `rules.lark`."""

from __future__ import annotations

import hashlib
import io
from functools import cache
from pathlib import Path

from lark import Lark
from lark import __version__ as lark_version

GRAMMAR = Path(__file__).with_name("rules.lark")
COMPILED = Path(__file__).with_name("rules.lark.compiled")
STARTS = ["start", "union", "expr"]


@cache
def grammar() -> Lark:
    """The grammar, ready to parse. Reading the compiled form costs a tenth of what making the tables costs."""
    try:
        head, _, tables = COMPILED.read_bytes().partition(b"\n")
        if head == heading():
            return Lark.load(io.BytesIO(tables))
    except Exception:  # a compiled form that cannot be read is as good as none, whatever is wrong with it
        pass
    return compile_grammar()


def compile_grammar(strict: bool = False) -> Lark:
    """The tables from the text. `strict` also shows that no two words can be confused (it needs interegular)."""
    text = GRAMMAR.read_text(encoding="utf-8")
    return Lark(text, parser="lalr", start=STARTS, propagate_positions=True, strict=strict)


def heading() -> bytes:
    """The first line of a compiled form that fits this text and the installed lark."""
    digest = hashlib.sha256(GRAMMAR.read_bytes().replace(b"\r\n", b"\n")).hexdigest()
    return f"lark {lark_version}, rules.lark {digest}".encode()
