"""From lark's tree to expressions and arguments, and what the other parts of building share with that."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from lark import Token, Tree

from . import syntax as s
from .diagnostics import Diagnostic, Place, Source, Span
from .words import BadEscape, unquote

DEEPEST = 50
"""Levels of an expression."""
DEEPEST_TREE = 160
"""Levels of lark's tree; more would not fit Python's stack."""


Parsed = Any
"""A tree of lark's, whose children are trees, tokens and None."""


def span_of(item: Any) -> Span | None:
    at = item.meta if isinstance(item, Tree) else item
    if isinstance(item, Tree) and item.meta.empty:
        return None
    return Span(at.line, at.column, at.end_line, at.end_column)


def _outer(tree: Parsed) -> Span:
    """The span of an operand with the parentheses around it."""
    meta = tree.meta
    start = (getattr(meta, "container_line", meta.line), getattr(meta, "container_column", meta.column))
    end = (getattr(meta, "container_end_line", meta.end_line), getattr(meta, "container_end_column", meta.end_column))
    return Span(*start, *end)


def make(cls: type[Any], /, **fields: Any) -> Any:
    """A node without validation: the grammar has seen to it, and pydantic's schemas need not be built to parse."""
    return cls.model_construct(**fields)


def too_deep(tree: Parsed) -> Any:
    """Something in `tree` that is nested too deep to be worked on."""
    level: list[Any] = [tree]
    for _ in range(DEEPEST_TREE):
        level = [child for item in level if isinstance(item, Tree) for child in item.children if child is not None]
        if not level:
            return None
    return level[0]


class ExpressionBuilder:
    """Builds expressions; what is wrong goes to `report`, and building goes on."""

    def __init__(self, source: Source, report: Callable[[Diagnostic], None]):
        self.source, self.report = source, report

    def fail(
        self,
        code: str,
        title: str,
        at: Any,
        label: str = "",
        *fixes: str,
        also: tuple[Place, ...] = (),
    ) -> None:
        span = at if isinstance(at, Span) or at is None else span_of(at)
        places = (Place(self.source, span, label),) if span else ()
        self.report(Diagnostic(code, title, places + also, fixes=fixes))

    def union(self, tree: Parsed) -> s.SelectorUnion:
        raise NotImplementedError

    def args(self, tree: Parsed | None, inner: bool = False) -> tuple[s.Arg, ...]:
        result: list[s.Arg] = []
        for item in [] if tree is None else tree.children:
            if item is None:
                continue
            key, value = item.children
            if key is not None and any(a.name == key for a in result):
                self.fail("GP129", f"`{key}` is given twice", key, "keep one of them")
            if key is None and any(a.name is not None for a in result):
                self.fail("GP129", "an argument without a name follows one with a name", item, "write name=value")
            result.append(
                make(
                    s.Arg,
                    name=str(key) if key is not None else None,
                    value=self.value(value) if inner else self.expr(value),
                    span=span_of(item),
                    name_span=span_of(key) if key is not None else None,
                )
            )
        return tuple(result)

    # ── expressions ──

    def expr(self, tree: Parsed) -> Any:
        """A whole expression: not a part of another one."""
        node = self.value(tree)
        if _deeper_than(node, DEEPEST):
            self.fail("GP119", f"this expression has more than {DEEPEST} levels", tree, "split it with `param`")
        return node

    def value(self, tree: Parsed) -> Any:
        return getattr(self, f"expr_{tree.data}")(tree, tree.children)

    def expr_number(self, tree: Parsed, children: list[Any]) -> s.Literal_:
        return make(s.Literal_, value=self.number(children[0]), span=span_of(tree))

    def expr_string(self, tree: Parsed, children: list[Any]) -> s.Literal_:
        return make(s.Literal_, value=self.text(children[0]), span=span_of(tree))

    def expr_true(self, tree: Parsed, children: list[Any]) -> s.Literal_:
        return make(s.Literal_, value={"true": True, "false": False, "none": None}[tree.data], span=span_of(tree))

    expr_false = expr_none = expr_true

    def expr_var(self, tree: Parsed, children: list[Any]) -> s.Var:
        return make(s.Var, name=str(children[0])[1:], span=span_of(tree))

    def expr_name(self, tree: Parsed, children: list[Any]) -> s.Name:
        name = str(children[0])
        ours = {"true": "true", "false": "false", "none": "none", "null": "none", "nil": "none"}.get(name.lower())
        if ours:
            self.fail("GP105", f"`{name}` is written {ours}", tree, f"write {ours}")
        elif name in s.KEYWORDS - {"has", "count"}:
            self.fail("GP117", f"`{name}` is a word of the language and no value", tree, "a value is missing before it")
        return make(s.Name, name=name, span=span_of(tree))

    def expr_call(self, tree: Parsed, children: list[Any]) -> s.Call:
        name, args = children
        return make(
            s.Call, name=str(name), args=self.args(args, inner=True), span=span_of(tree), name_span=span_of(name)
        )

    def expr_query(self, tree: Parsed, children: list[Any]) -> s.Query:
        return make(s.Query, function=str(children[0]), selector=self.union(children[1]), span=span_of(tree))

    def expr_list(self, tree: Parsed, children: list[Any]) -> s.ListExpr:
        return make(s.ListExpr, items=tuple(self.value(t) for t in children if t is not None), span=span_of(tree))

    def expr_item(self, tree: Parsed, children: list[Any]) -> s.Item:
        return make(s.Item, value=self.value(children[0]), index=self.value(children[1]), span=span_of(tree))

    def expr_sign(self, tree: Parsed, children: list[Any]) -> Any:
        sign, operand = children
        if sign == "-" and operand.data == "number" and not self.between(sign, operand.children[0]).strip():
            return make(s.Literal_, value=-self.number(operand.children[0]), span=span_of(tree))
        return make(s.Unary, op=str(sign), operand=self.value(operand), span=span_of(tree))

    def expr_negate(self, tree: Parsed, children: list[Any]) -> s.Unary:
        return make(s.Unary, op="not", operand=self.value(children[0]), span=span_of(tree))

    def expr_sum(self, tree: Parsed, children: list[Any]) -> Any:
        left = self.value(children[0])
        start = _outer(children[0])
        for op, right in zip(children[1::2], children[2::2]):
            span = Span(*start[:2], *_outer(right)[2:])
            left = make(s.Binary, op=str(op), left=left, right=self.value(right), span=span)
        return left

    expr_product = expr_power = expr_sum

    def expr_or(self, tree: Parsed, children: list[Any]) -> s.BoolOp:
        return make(s.BoolOp, op=tree.data, operands=tuple(self.value(t) for t in children), span=span_of(tree))

    expr_and = expr_or

    def expr_compare(self, tree: Parsed, children: list[Any]) -> s.Compare:
        links = tuple(
            make(
                s.Comparison,
                op=" ".join(str(word) for word in link.children[:-1]),
                right=self.value(link.children[-1]),
                span=span_of(link),
            )
            for link in children[1:]
        )
        return make(s.Compare, left=self.value(children[0]), links=links, span=span_of(tree))

    def expr_if_else(self, tree: Parsed, children: list[Any]) -> s.IfElse:
        then, test, otherwise = (self.value(t) for t in children)
        return make(s.IfElse, then=then, test=test, otherwise=otherwise, span=span_of(tree))

    # ── words ──

    def number(self, token: Token) -> int | float:
        text = str(token)
        if re.search(r"_(?![0-9])", text):
            self.fail(
                "GP120", "`_` stands between two digits of a number", token, f"write {text.replace('_', '')[:40]}"
            )
            return 0
        digits = text.replace("_", "")
        if token.type == "INT":
            if len(digits) > 19 or int(digits) >= 2**63:
                self.fail("GP120", "this number does not fit in 64 bits", token, f"it has {len(digits)} digits")
                return 0
            return int(digits)
        value = float(digits)
        if value == float("inf"):
            self.fail("GP120", "this number is larger than a float can be", token, "the largest is about 1.8e308")
            return 0.0
        return value

    def text(self, token: Token) -> str:
        try:
            return unquote(str(token))
        except BadEscape as error:
            start = position_in(token, error.start)
            end = position_in(token, error.end)
            self.fail(
                "GP121", f"`{error.text}` means nothing in a string", Span(*start, *end), "a backslash is written \\\\"
            )
            return ""

    def between(self, first: Token, second: Token) -> str:
        return self.source.text[first.end_pos : second.start_pos]


def position_in(token: Token, offset: int) -> tuple[int, int]:
    """The line and column of an offset in a token."""
    before = str(token)[:offset]
    line, column = token.line or 1, token.column or 1
    newlines = before.count("\n")
    return (line + newlines, offset - before.rfind("\n")) if newlines else (line, column + offset)


def _deeper_than(node: Any, limit: int) -> bool:
    level = [node]
    for _ in range(limit):
        level = [child for item in level for child in _operands(item)]
        if not level:
            return False
    return True


def _operands(node: Any) -> list[Any]:
    if isinstance(node, s.Binary):
        return [node.left, node.right]
    if isinstance(node, s.Unary):
        return [node.operand]
    if isinstance(node, s.BoolOp):
        return list(node.operands)
    if isinstance(node, s.Compare):
        return [node.left, *(link.right for link in node.links)]
    if isinstance(node, s.IfElse):
        return [node.then, node.test, node.otherwise]
    if isinstance(node, s.Item):
        return [node.value, node.index]
    if isinstance(node, s.ListExpr):
        return list(node.items)
    if isinstance(node, s.Call):
        return [arg.value for arg in node.args]
    return []
