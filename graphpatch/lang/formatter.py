"""Syntax to text, in one canonical form: `parse_rules(format_rules(file)) == file` for every file that can be written.

What no text can say (a name with a dot in quotes, an infinite number, a word of the language as a label) raises
`RuleError`. Comments are no part of the syntax and are lost.
"""

from __future__ import annotations

import math
import re
from typing import NoReturn

from . import syntax as s
from .diagnostics import Diagnostic, RuleError
from .words import CLASS, DOTTED, NAME, SEGMENT, quote

WIDTH = 100
"""A statement longer than this is broken before its clauses."""

# How tightly each form binds, loosest first: what binds more loosely than its place asks for is put in parentheses.
IF, OR, AND, NOT, COMPARE, SUM, PRODUCT, UNARY, POWER, POSTFIX = range(10)


def format_rules(file: s.RuleFile) -> str:
    """A whole file, ending in a newline; an empty file is an empty text."""
    blocks: list[str] = []
    kinds: list[str] = []
    for statement in file.statements:
        if kinds and (statement.kind != kinds[-1] or statement.kind in ("patch", "when")):
            blocks.append("")
        blocks.append(format_statement(statement))
        kinds.append(statement.kind)
    return "\n".join(blocks) + "\n" if blocks else ""


def format_statement(statement: s.Statement, indent: str = "") -> str:
    """One statement, without a newline at its end; its first line begins with `indent`."""
    if isinstance(statement, s.Use):
        target = quote(statement.target) if statement.by_path else _word(statement.target, DOTTED, "packaged name")
        return f"{indent}use {target}{_args(statement.args)}"
    if isinstance(statement, s.Param):
        type_ = f": {statement.type}" if statement.type else ""
        default = f" = {format_expression(statement.default)}" if statement.default is not None else ""
        return f"{indent}param {_name(statement.name, 'param')}{type_}{default}"
    if isinstance(statement, s.Alias):
        return f"{indent}alias {_name(statement.name, 'alias')} = {format_selector(statement.selector)}"
    if isinstance(statement, s.Require):
        return f"{indent}require {format_expression(statement.test)}"
    if isinstance(statement, s.When):
        body = "".join(format_statement(inner, indent + "  ") + "\n" for inner in statement.body)
        return f"{indent}when {format_expression(statement.test)} {{\n{body}{indent}}}"
    if isinstance(statement, s.Map):
        target = (
            "none" if statement.target is None else ".".join(_key(k, i == 0) for i, k in enumerate(statement.target))
        )
        using = [f"using {format_op(statement.using)}"] if statement.using else []
        source = ".".join(_key(k, False) for k in statement.source)
        return _lines(indent, f"map {source} -> {target}", using)
    return _lines(indent, *_target_and_clauses(statement))


def _lines(indent: str, head: str, clauses: list[str]) -> str:
    line = " ".join([indent + head, *clauses])
    if len(line) <= WIDTH:
        return line
    return "\n".join([indent + head, *(f"{indent}  {clause}" for clause in clauses)])


def _target_and_clauses(statement: s.Patch | s.Freeze) -> tuple[str, list[str]]:
    clauses: list[str] = []
    if statement.where is not None:
        clauses.append(f"where {format_expression(statement.where)}")
    if isinstance(statement, s.Patch):
        keyword = "patch"
        clauses.append("with " + " then ".join(map(format_op, statement.ops)))
    else:
        keyword = "train" if statement.trainable else "freeze"
    if statement.except_ is not None:
        clauses.append(f"except {format_selector(statement.except_)}")
    if statement.expect is not None:
        clauses.append(format_expect(statement.expect))
    if statement.label is not None:
        clauses.append(f"as {_name(statement.label, 'label')}")
    if isinstance(statement, s.Patch) and statement.overrides:
        clauses.append("overrides " + ", ".join(_name(label, "label") for label in statement.overrides))
    return f"{keyword} {format_selector(statement.selector)}", clauses


def format_expect(expect: s.Expect) -> str:
    """`expect 4 per layers[*]`"""
    if expect.any:
        return "expect any"
    if expect.count is None:
        _refuse("an `expect` without a count")
    cmp = "" if expect.cmp == "==" else f"{expect.cmp} "
    per = f" per {format_selector(expect.per)}" if expect.per is not None else ""
    return f"expect {cmp}{format_expression(expect.count)}{per}"


def format_op(op: s.OpCall) -> str:
    """`lora(rank=16)`; without arguments also without parentheses."""
    return _word(op.name, DOTTED, "op") + _args(op.args)


def _args(args: tuple[s.Arg, ...]) -> str:
    return "(" + ", ".join(map(_arg, args)) + ")" if args else ""


def _arg(arg: s.Arg) -> str:
    value = format_expression(arg.value)
    return value if arg.name is None else f"{_word(arg.name, NAME, 'argument')}={value}"


# ── selectors ────────────────────────────────────────────────────────────────────────────────────────────────────────


def format_selector(selector: s.SelectorUnion | s.PathSelector | s.RegexSelector) -> str:
    """A selector, or several with ` | ` between them."""
    if isinstance(selector, s.SelectorUnion):
        return " | ".join(map(format_selector, selector.branches))
    cls = ""
    if selector.cls is not None:
        cls = ":" + _word(selector.cls, CLASS, "class")
    if isinstance(selector, s.RegexSelector):
        if not selector.pattern or "\n" in selector.pattern:
            _refuse("a regex that is empty or has a line break in it")
        return "/" + re.sub(r"\\.|/", lambda m: "\\/" if m[0] == "/" else m[0], selector.pattern) + "/" + cls
    path = ("^" if selector.anchored else "") + ".".join(map(format_step, selector.steps))
    if not path and not cls:
        _refuse("a selector without a name, a class or `^`")
    return path + cls


def format_step(step: s.Step) -> str:
    """`layers[0:8]`, `"to q"`, `@qkv`."""
    index = format_index(step.index) if step.index is not None else ""
    if step.kind == "role":
        return "@" + _word(step.name, NAME, "role") + index
    return _segment(step.name, step.kind == "quoted") + index


def _segment(name: str, quoted: bool) -> str:
    if not quoted and SEGMENT.fullmatch(name) and ("**" not in name or name == "**"):
        return name
    if not name or "." in name or "*" in name:
        _refuse(f"a step called {quote(name)}")
    return quote(name)


def format_index(index: s.Index) -> str:
    """`[0, 5, 9:12]`, `[i in 4:]`; brackets included."""
    spans = ", ".join(map(_span, index.spans))
    if index.capture is None:
        if not spans:
            _refuse("empty brackets")
        return f"[{spans}]"
    capture = _name(index.capture, "capture")
    return f"[{capture} in {spans}]" if spans else f"[{capture}]"


def _span(span: s.IndexSpan) -> str:
    if isinstance(span, s.Every):
        return "*"
    if isinstance(span, s.At):
        return _bound(span.at)
    start, stop, step = (_bound(b) if b is not None else "" for b in (span.start, span.stop, span.step))
    return f"{start}:{stop}" + (f":{step}" if step else "")


def _bound(expr: s.Expr) -> str:
    if (isinstance(expr, s.Literal_) and type(expr.value) is int) or isinstance(expr, s.Var):
        return format_expression(expr)
    if isinstance(expr, s.Unary) and expr.op != "not" and isinstance(expr.operand, s.Var):
        return format_expression(expr)
    return f"({format_expression(expr)})"


def _key(key: s.KeyStep, first: bool) -> str:
    # A first name `none` would leave the key behind.
    text = quote(key.name) if first and key.name == "none" and not key.quoted else _segment(key.name, key.quoted)
    if key.index is not None:
        return text + format_index(key.index)
    return text + (f"[{_expression(key.at, SUM)}]" if key.at is not None else "")


# ── expressions ──────────────────────────────────────────────────────────────────────────────────────────────────────


def format_expression(expr: s.Expr) -> str:
    """An expression with no more parentheses than it needs."""
    return _expression(expr, IF)


def _expression(expr: s.Expr, place: int) -> str:
    text, binds = _form(expr)
    return text if binds >= place else f"({text})"


def _form(expr: s.Expr) -> tuple[str, int]:
    if isinstance(expr, s.Literal_):
        return _literal(expr.value)
    if isinstance(expr, s.Var):
        return "$" + _word(expr.name, NAME, "param"), POSTFIX
    if isinstance(expr, s.Name):
        if expr.name in s.KEYWORDS - {"has", "count"} or expr.name.lower() in ("true", "false", "none", "null", "nil"):
            _refuse(f"an attribute called `{expr.name}`")
        return _word(expr.name, DOTTED, "attribute"), POSTFIX
    if isinstance(expr, s.ListExpr):
        return "[" + ", ".join(map(format_expression, expr.items)) + "]", POSTFIX
    if isinstance(expr, s.Item):
        return f"{_expression(expr.value, POSTFIX)}[{format_expression(expr.index)}]", POSTFIX
    if isinstance(expr, s.Call):
        if expr.name in s.KEYWORDS:
            _refuse(f"a function called `{expr.name}`")
        args = "(" + ", ".join(map(_arg, expr.args)) + ")"
        return _word(expr.name, DOTTED, "function") + args, POSTFIX
    if isinstance(expr, s.Query):
        return f"{expr.function}({format_selector(expr.selector)})", POSTFIX
    if isinstance(expr, s.Unary):
        return _unary(expr)
    if isinstance(expr, s.Binary):
        if expr.op == "**":
            return f"{_expression(expr.left, POSTFIX)} ** {_expression(expr.right, UNARY)}", POWER
        binds = SUM if expr.op in "+-" else PRODUCT
        return f"{_expression(expr.left, binds)} {expr.op} {_expression(expr.right, binds + 1)}", binds
    if isinstance(expr, s.BoolOp):
        binds = OR if expr.op == "or" else AND
        return f" {expr.op} ".join(_expression(operand, binds + 1) for operand in expr.operands), binds
    if isinstance(expr, s.Compare):
        links = "".join(f" {link.op} {_expression(link.right, SUM)}" for link in expr.links)
        return _expression(expr.left, SUM) + links, COMPARE
    then, test, otherwise = _expression(expr.then, OR), _expression(expr.test, OR), _expression(expr.otherwise, IF)
    return f"{then} if {test} else {otherwise}", IF


def _unary(expr: s.Unary) -> tuple[str, int]:
    if expr.op == "not":
        return f"not {_expression(expr.operand, NOT)}", NOT
    operand = _expression(expr.operand, UNARY)
    # `-1` is a number; the sign before the number 1 is `-(1)`.
    if expr.op == "-" and isinstance(expr.operand, s.Literal_) and operand[0] in "0123456789.":
        operand = f"({operand})"
    return expr.op + operand, UNARY


def _literal(value: bool | int | float | str | None) -> tuple[str, int]:
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value], POSTFIX
    if isinstance(value, str):
        if re.search("[\ud800-\udfff]", value):
            _refuse("a string with half a character in it")
        return quote(value), POSTFIX
    if (isinstance(value, float) and not math.isfinite(value)) or (isinstance(value, int) and abs(value) >= 2**63):
        _refuse("a number that does not fit in 64 bits")
    negative = value < 0 or (isinstance(value, float) and math.copysign(1, value) < 0)
    return repr(value), UNARY if negative else POSTFIX


# ── words ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _name(name: str, what: str) -> str:
    if name in s.KEYWORDS or name.lower() in ("true", "false", "none"):
        _refuse(f"a {what} called `{name}`, a word of the language,")
    return _word(name, NAME, what)


def _word(word: str, pattern: re.Pattern[str], what: str) -> str:
    if not pattern.fullmatch(word):
        article = "an" if what[0] in "aeiou" else "a"
        _refuse(f"{article} {what} called {quote(word)}")
    return word


def _refuse(what: str) -> NoReturn:
    raise RuleError(Diagnostic("GP134", f"{what} cannot be written in a rule file"))
