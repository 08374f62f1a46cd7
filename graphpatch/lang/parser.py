"""Text to syntax. A file is read to its end: after a mistake reading goes on at the next statement."""

from __future__ import annotations

import re
from typing import Any

from lark import Token, Tree
from lark.exceptions import UnexpectedCharacters, UnexpectedToken
from lark.parsers.lalr_analysis import Shift

from .build import Builder
from .build_expressions import too_deep
from .diagnostics import Diagnostic, Place, RuleError, Source, Span
from .grammar import grammar
from .spot import STATEMENTS, Spot
from .syntax import Expr, ListExpr, Literal_, RuleFile, SelectorUnion, Unary

LARGEST = 250_000
"""Characters in a rule file; reading as many takes seconds."""
MOST_FINDINGS = 30
DEEPEST_BRACKETS = 60
LONGEST_STATEMENT = 20_000
LONGEST_WORD = 10_000
DEEPEST_STACK = 1000
"""Words that the parser may hold before it knows what they are part of."""

_OPENING = {"LPAR": ")", "LSQB": "]", "LBRACE": "}"}
_CLOSING = {"RPAR", "RSQB", "RBRACE"}
_WORDS = re.compile(r"[A-Za-z]+")


def parse_rules(text: str | bytes, name: str = "<rules>") -> RuleFile:
    """A rule file as data, with the place of every node; raises `RuleError` with all that is wrong with it."""
    source = Source(name, decode(text, name))
    return _Reading(source, "start").run()


def parse_selector(text: str, name: str = "<selector>") -> SelectorUnion:
    """A selector, or several with `|` between them; raises `RuleError`."""
    return _Reading(Source(name, decode(text, name)), "union").run()


def parse_expression(text: str, name: str = "<expression>") -> Expr:
    """An expression; raises `RuleError`."""
    return _Reading(Source(name, decode(text, name)), "expr").run()


def parse_value(text: str, type: str | None = None, name: str = "<value>") -> Any:
    """The value of a param as a command line gives it: `--set rank=32`.

    With type `str` the text is the value, unless it is quoted; without a type, what is no literal is a string. A list
    is written `[1, 2]`. Raises `RuleError` where the text is no literal. Whether the value fits the type is checked
    where it is given to a program.
    """
    source = Source(name, text)
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"
    if type == "str" and not quoted:
        return text
    try:
        return _constant(parse_expression(text, name), source)
    except RuleError:
        if type is None and not quoted and re.fullmatch(r"[\w./@:+-]+", text):
            return text
        raise


def _constant(expr: Expr, source: Source) -> Any:
    if isinstance(expr, Literal_):
        return expr.value
    if isinstance(expr, ListExpr):
        return [_constant(item, source) for item in expr.items]
    if isinstance(expr, Unary) and expr.op == "+" and isinstance(expr.operand, Literal_):
        return expr.operand.value
    label = "write a number, true, false, none, a string or a list of these"
    places = (Place(source, expr.span, label),) if expr.span else ()
    raise RuleError(Diagnostic("GP133", "this is no plain value", places))


def decode(text: str | bytes, name: str) -> str:
    """The text of a file: UTF-8, without a BOM. Raises `RuleError` for what is no text, and for what is too long."""

    def refuse(title: str, *fixes: str) -> RuleError:
        return RuleError(Diagnostic("GP100", title, text=(f"in {name}",), fixes=fixes))

    if len(text) > LARGEST:
        raise refuse(f"a rule file has at most {LARGEST:,} characters; this one has more", "split it with `use`")
    if isinstance(text, bytes):
        try:
            decoded = text.decode("utf-8")
        except UnicodeDecodeError as error:
            line = text.count(b"\n", 0, error.start) + 1
            byte = f"byte 0x{text[error.start]:02x} at offset {error.start}"
            raise refuse(f"line {line} is not UTF-8: {byte}", "save the file as UTF-8") from None
        text = decoded
    text = text.removeprefix("\ufeff")
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise refuse(f"line {line} has a NUL byte: this is no text", "is this the right file? A saved plan is JSON")
    if surrogate := re.search("[\ud800-\udfff]", text):
        line = text.count("\n", 0, surrogate.start()) + 1
        raise refuse(f"line {line} has a character that UTF-8 cannot hold", "save the file as UTF-8")
    return text


class _Stop(Exception):
    """Reading cannot go on: what was found is all there will be."""


class _Reading:
    """One text, from its first word to its last."""

    def __init__(self, source: Source, start: str):
        self.source, self.text, self.start = source, source.text, start
        self.found: list[Diagnostic] = []
        self.last: Token | None = None
        self.interactive = grammar().parse_interactive(self.text, start)
        self.state, self.thread = self.interactive.parser_state, self.interactive.lexer_thread

    def run(self) -> Any:
        tree = None
        try:
            while tree is None:
                tree = self.read()
        except _Stop:
            pass
        if isinstance(tree, Tree):
            self.build(tree)
        if self.found:
            places = [d.places[0].span if d.places else Span(0, 0, 0, 0) for d in self.found]
            raise RuleError([d for _, d in sorted(zip(places, self.found), key=lambda pair: pair[0])])
        return self.result

    def build(self, tree: Tree) -> None:
        builder = Builder(self.source, self.found.append)
        deep = too_deep(tree)
        if deep is not None:
            builder.fail("GP119", "this is nested too deep", deep, "split it with `param` or `alias`")
            return
        build = {"start": builder.start, "union": builder.union, "expr": builder.expr}[self.start]
        self.result = build(tree)

    def read(self) -> Tree | None:
        """Read on to the end, or to the next mistake, which is noted and passed: then None."""
        state, depth, words = self.state, self.depth(), 0
        before: tuple[list[Any], list[Any]] | None = None
        try:
            for token in self.thread.lex(state):
                depth += (token.type in _OPENING) - (token.type in _CLOSING)
                if depth > DEEPEST_BRACKETS or len(state.state_stack) > DEEPEST_STACK:
                    self.note("GP119", "this is nested too deep", token, "split it with `param`")
                    raise _Stop
                words = 0 if token.type.lower() in STATEMENTS else words + 1
                if words > LONGEST_STATEMENT or (len(token) > LONGEST_WORD and token.type != "STRING"):
                    what = "statement" if words > LONGEST_STATEMENT else "word"
                    self.note("GP119", f"this {what} is too long", token, "split it")
                    raise _Stop
                if self.runs_on(token):
                    raise UnexpectedToken(token, set())
                # Kept, since the parser may reduce on behalf of a word before it finds that the word cannot stand.
                before = (list(state.state_stack), list(state.value_stack))
                state.feed_token(token)
                self.last, before = token, None
            before = (list(state.state_stack), list(state.value_stack))
            return state.feed_token(self.end_token(), True)
        except UnexpectedToken as error:
            if before is not None:
                state.state_stack[:], state.value_stack[:] = before
            self.mistake(len(self.text) if error.token.type == "$END" else error.token.start_pos or 0)
        except UnexpectedCharacters as error:
            self.mistake(error.pos_in_stream or 0)
        return None

    def runs_on(self, token: Token) -> bool:
        """Whether a keyword is only the beginning of a longer word, `with` of `without`."""
        end = token.end_pos or 0
        return (
            token.type not in ("KEY", "QUERY")
            and end < len(self.text)
            and (self.text[end].isalnum() or self.text[end] == "_")
            and _WORDS.fullmatch(token) is not None
        )

    def end_token(self) -> Token:
        lines = self.text.count("\n")
        column = len(self.text) - self.text.rfind("\n")
        size = len(self.text)
        return Token("$END", "", size, lines + 1, column, lines + 1, column, size)

    def depth(self) -> int:
        """How many brackets are open."""
        words = [value.type for value in self.state.value_stack if isinstance(value, Token)]
        return sum(word in _OPENING for word in words) - sum(word in _CLOSING for word in words)

    def note(self, code: str, title: str, token: Token, label: str) -> None:
        span = Span(token.line, token.column, token.end_line, token.end_column)  # type: ignore[arg-type]
        self.found.append(Diagnostic(code, title, (Place(self.source, span, label),)))

    # ── mistakes ──

    def mistake(self, offset: int) -> None:
        """Note what is wrong at `offset` and put the parser where it can go on."""
        words = [value for value in self.state.value_stack if isinstance(value, Token)]
        spot = Spot(self.source, offset, self.interactive.accepts(), words, self.last, self.start)
        # What people get wrong is known by a file of its own, which a right text never needs.
        from .mistakes import explain

        finding, resume = explain(spot)
        self.found.append(finding)
        if self.start != "start" or len(self.found) >= MOST_FINDINGS:
            raise _Stop
        if finding.code == "GP109":  # a stray `;` breaks nothing
            self.move(resume)
        else:
            self.recover(resume, spot)

    def recover(self, offset: int, spot: Spot) -> None:
        if spot.words and spot.words[-1].type == "RBRACE" and "PATCH" in spot.expected:
            # The block before is whole, and would be lost with the rest if it were not taken first.
            self.state.feed_token(Token("PATCH", "patch", offset, 1, 1, 1, 1, offset))
            self.state.state_stack.pop()
            self.state.value_stack.pop()
        popped = self.pop()
        block = any(t.type == "WHEN" for t in popped) and not any(t.type == "LBRACE" for t in popped)
        if block or (spot.at_statement and spot.word in ("else", "elif", "if")):
            brace = self.block_after(offset)
            if brace is not None:
                # The test is lost, what the block holds is not: read it as if it were `when true {`.
                for kind, word in (("WHEN", "when"), ("TRUE", "true"), ("LBRACE", "{")):
                    line, column = self.line_column(brace)
                    self.state.feed_token(Token(kind, word, brace, line, column, line, column + 1, brace + 1))
                self.move(brace + 1)
                return
        self.move(self.next_statement(offset))

    def pop(self) -> list[Token]:
        """Take the unfinished statement off the stacks; its words are returned, first first."""
        table, state = self.state.parse_conf.parse_table.states, self.state
        popped: list[Token] = []
        while len(state.state_stack) > 1:
            action = table[state.state_stack[-1]].get("PATCH")
            if action is not None and action[0] is Shift:
                break
            state.state_stack.pop()
            value = state.value_stack.pop()
            if isinstance(value, Token):
                popped.append(value)
        return popped[::-1]

    _SCAN = re.compile(
        r"""(?P<skip>"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'|\#[^\n]*|\{\s*[\w*?]+(?:\s*,\s*[\w*?]+)*\s*\})"""
        r"""|(?P<open>\{)|(?P<close>\})|(?P<word>[A-Za-z_]\w*)""",
        re.VERBOSE,
    )

    def next_statement(self, offset: int) -> int:
        """Where reading can go on: a statement keyword that begins a line or a block, or the end of this block."""
        inside = self.depth() > 0
        depth = 0
        for match in self._SCAN.finditer(self.text, offset):
            if match["open"]:
                depth += 1
            elif match["close"]:
                if depth == 0 and inside:
                    return match.start()
                depth = max(0, depth - 1)
            elif match["word"] in STATEMENTS and self.begins(match.start()):
                following = self.text[match.end() : match.end() + 1]
                if following.isspace() and not (inside and match["word"] in STATEMENTS[:3]):
                    return match.start()
        return len(self.text)

    def begins(self, offset: int) -> bool:
        before = self.text[:offset].rstrip(" \t")[-1:]
        return before in ("", "\n", "\r", "{", "}", ";")

    def block_after(self, offset: int) -> int | None:
        """The brace that opens the block of a `when` whose test is wrong."""
        for match in self._SCAN.finditer(self.text, offset):
            if match["open"]:
                return match.start()
            if match["close"] or (match["word"] in STATEMENTS and self.begins(match.start())):
                return None
        return None

    def line_column(self, offset: int) -> tuple[int, int]:
        return self.text.count("\n", 0, offset) + 1, offset - self.text.rfind("\n", 0, offset)

    def move(self, offset: int) -> None:
        """Let the lexer go on at `offset`."""
        assert self.thread.state is not None
        counter = self.thread.state.line_ctr
        counter.char_pos = offset
        counter.line, counter.column = self.line_column(offset)
        counter.line_start_pos = offset - counter.column + 1
        if offset >= len(self.text):
            self.close_blocks()

    def close_blocks(self) -> None:
        while self.depth():
            line, column = self.line_column(len(self.text))
            size = len(self.text)
            self.state.feed_token(Token("RBRACE", "}", size, line, column, line, column, size))
