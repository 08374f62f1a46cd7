"""Expressions are worth what Python says, within bounds, and what has no value says why."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graphpatch.lang import syntax as s
from graphpatch.lang.diagnostics import Span
from graphpatch.lang.evaluate import (
    Constants,
    EvaluationError,
    MissingKey,
    NoneArithmetic,
    constant,
    evaluate,
    unknown_function,
)
from graphpatch.lang.formatter import format_expression
from graphpatch.lang.parser import parse_expression

FUNCTIONS = {
    "sqrt": math.sqrt,
    "log2": math.log2,
    "min": min,
    "max": max,
    "abs": abs,
    "round": round,
    "int": int,
    "float": float,
    "len": len,
}


def worth(text: str) -> Any:
    return evaluate(parse_expression(text), Constants())


@pytest.mark.parametrize(
    "text",
    """1 + 2 * 3|2 ** 3 ** 2|-2 ** 2|(-2) ** 2|2 ** -1|7 // -2|-7 % 3|7.5 // 2|1 / 3|10 - 4 - 3|2 * 3 % 4
    1 < 2 < 3|1 < 3 < 2|1 == 1.0 == 1|3 > 2 >= 2 != 5|1 in [1, 2]|3 not in [1, 2]|"a" in "abc"|"x" not in "abc"
    0 or 5|3 and 0|not 0|0 and 1 / 0|1 or 1 / 0|1 if 2 > 1 else 1 / 0|1 / 0 if 2 < 1 else 4
    "ab" + "c"|[1] + [2, 3]|"ab" * 3|2 * [1, 2]|[1, 2, 3][-1]|"abc"[1]|[[1, 2], [3]][0][1]|[] == []|[1, 2] < [1, 3]|"a" < "b"
    sqrt(16)|log2(8)|min(3, 1, 2)|max([1, 5, 2])|abs(-3)|round(2.567, 1)|round(2.5)|int(2.9)|int(-2.9)|float(3)|len([1, 2])|len("abc")
    min("b", "a")|2 ** 100|0.1 + 0.2|1e3|+3|- -3|1 - -1""".replace("\n", "|").split("|"),
)
def test_pythons_value(text: str) -> None:
    expected = eval(text.strip(), {"__builtins__": {}}, dict(FUNCTIONS))
    got = worth(text.strip())
    assert got == expected and type(got) is type(expected)


_numbers = st.integers(-9, 9) | st.sampled_from([0.5, -1.5, 2.0])
_python = st.recursive(
    (_numbers | st.booleans()).map(lambda v: s.Literal_(value=v)),
    lambda inner: (
        st.builds(s.Binary, op=st.sampled_from(["+", "-", "*", "/", "//", "%"]), left=inner, right=inner)
        | st.builds(s.Unary, op=st.sampled_from(["-", "+", "not"]), operand=inner)
        | st.builds(
            s.BoolOp, op=st.sampled_from(["and", "or"]), operands=st.lists(inner, min_size=2, max_size=3).map(tuple)
        )
        | st.builds(s.IfElse, then=inner, test=inner, otherwise=inner)
        | st.builds(
            s.Compare,
            left=inner,
            links=st.lists(
                st.builds(s.Comparison, op=st.sampled_from(["<", "<=", ">", ">=", "==", "!="]), right=inner),
                min_size=1,
                max_size=3,
            ).map(tuple),
        )
    ),
    max_leaves=10,
)


@settings(deadline=None, max_examples=300, suppress_health_check=list(HealthCheck))
@given(_python)
def test_as_python_on_numbers(expr: s.Expr) -> None:
    text = format_expression(expr).replace("true", "True").replace("false", "False")
    try:
        expected: Any = eval(text)
    except ZeroDivisionError:
        with pytest.raises(EvaluationError, match="division by zero"):
            evaluate(expr, Constants())
        return
    got = evaluate(expr, Constants())
    assert got == expected and type(got) is type(expected)


@pytest.mark.parametrize(
    ("text", "says", "column"),
    [
        ("1 + 1 / 0", "division by zero: `0` is 0", 9),
        ("5 % (2 - 2)", "division by zero: `2 - 2` is 0", 6),
        ("0 ** -1", "0 has no negative power", 1),
        ("10 ** 10 ** 10", "too large", 1),
        ("2 ** 300", "too large", 1),
        ("1e300 * 1e300", "too large", 1),
        ("(-8) ** 0.5", "no such power", 1),
        ("sqrt(-1)", "-1 has no square root", 1),
        ("log2(0)", "0 has no logarithm", 1),
        ('"a" * 100000', "larger than 10000", 1),
        ("[[0] * 100] * 200", "larger than 10000", 1),
        ('["a" * 9000] * 9000', "larger than 10000", 1),
        ('"" * 2 ** 200', "larger than 10000", 1),
        ('1 + "a"', "`+` needs numbers, and this is a string", 5),
        ("-[1]", "`-` needs numbers, and this is a list", 2),
        ('"%d" % 3', "`%` needs numbers", 1),
        ('1 < "a"', "`<` cannot compare an integer with a string", 3),
        ('[1] < ["a"]', "their items are of different kinds", 5),
        ("1 in 2", "`in` needs a list or a string, and this is an integer", 6),
        ('1 in "a"', "`in` a string needs a string on its left", 3),
        ("3 is 3", "values are compared with `==`", 3),
        ("[1, 2][5]", "`[1, 2]` has 2 items, so no [5]", 1),
        ("[1][true]", "an index is an integer, and this is a bool", 5),
        ("1[0]", "`1` is an integer and has no items", 1),
        ("sqrq(2)", "there is no function `sqrq`; did you mean `sqrt`?", 1),
        ("sqrt(x=2)", "the argument of `sqrt` is given without a name", 6),
        ('sqrt("a")', "`sqrt` cannot take a string", 1),
        ("sqrt()", "`sqrt` cannot take nothing", 1),
        ("len(3)", "`len` cannot take an integer", 1),
        ('float("1e999")', "`float` cannot take a string", 1),
        ("1 + $x", "`$x` has no value here", 5),
        ("1 + eps", "`eps` means nothing here: quote it if it is text", 5),
        ("has(a)", "`has` needs a model", 1),
    ],
)
def test_what_has_no_value(text: str, says: str, column: int) -> None:
    with pytest.raises(EvaluationError) as caught:
        worth(text)
    assert says in caught.value.message
    assert caught.value.span is not None and caught.value.span.column == column


class Module(Constants):
    """A scope with attributes, of which absent ones read none, and a config."""

    config = {"hidden_size": 64, "types": ["full", "sliding"], "rope": {"theta": 1e4}, "softcap": None}

    def name(self, dotted: str, span: Span | None) -> Any:
        head, _, key = dotted.partition(".")
        if head != "config":
            return {"out_features": 8, "bias": True, "kernel_size": (3, 3)}.get(head)
        if key not in self.config:
            raise MissingKey(f"`config` has no `{key}`", span)
        return self.config[key]

    def call(self, name: str, arguments: tuple[s.Arg, ...], span: Span | None) -> Any:
        if name == "adapter.bottleneck":
            return (name, [evaluate(arg.value, self) for arg in arguments])
        raise unknown_function(name, span)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("missing is none", True),
        ("missing == none", True),
        ("missing == 3", False),
        ("missing in [1, none]", True),
        ("missing is not none and missing > 3", False),
        ("missing is none or missing > 3", True),
        ("kernel_size == [3, 3]", True),
        ("kernel_size[0] + 1", 4),
        ("[3, 3] in [kernel_size]", True),
        ("config.gone is none", True),
        ("config.gone == 3", False),
        ("config.gone != 3", True),
        ("none == config.gone is none", True),
        ("config.softcap is none", True),
        ('config.rope["theta"]', 1e4),
        ('config.rope["gone"] is none', True),
        ('"theta" in config.rope', True),
        ('config.types[0] == "full"', True),
        ("adapter.bottleneck(2 * 3)", ("adapter.bottleneck", [6])),
    ],
)
def test_absent_reads_none_where_that_makes_sense(text: str, value: Any) -> None:
    assert evaluate(parse_expression(text), Module()) == value


@pytest.mark.parametrize(
    "text",
    [
        "missing > 3",
        "not missing > 3",
        "not (missing + 1 == 2)",
        "missing % 64 == 0",
        "3 < missing",
        "-missing",
        "missing[0] == 1",
        "sqrt(missing) > 1",
        "min(missing, 3)",
        "min([1, missing])",
        "1 in missing",
        "out_features > 3 and missing < 1",
    ],
)
def test_arithmetic_on_none_is_told_apart(text: str) -> None:
    with pytest.raises(NoneArithmetic):
        evaluate(parse_expression(text), Module())


@pytest.mark.parametrize(
    "text", ["config.gone > 3", "config.gone + 1", "3 < config.gone", "1 == config.gone < 3", "config.gone in [1]"]
)
def test_a_missing_key_is_an_error_elsewhere(text: str) -> None:
    expr = parse_expression(text)
    if text.startswith("1 =="):  # false before it comes to that
        assert evaluate(expr, Module()) is False
        return
    with pytest.raises(MissingKey, match="has no `gone`"):
        evaluate(expr, Module())


def test_each_operand_is_worked_out_once() -> None:
    class Counting(Constants):
        seen = 0

        def var(self, name: str, span: Span | None) -> Any:
            self.seen += 1
            return 1

    expr: s.Expr = s.Var(name="x")
    for _ in range(30):  # each in the middle of a chain: twice each would be a billion
        link = s.Comparison(op="==", right=expr)
        expr = s.Compare(left=s.Literal_(value=1), links=(link, s.Comparison(op="==", right=s.Literal_(value=1))))
    scope = Counting()
    assert evaluate(expr, scope) is True and scope.seen == 1


def test_depth_of_what_no_parser_made() -> None:
    expr: s.Expr = s.Literal_(value=1)
    for _ in range(5000):
        expr = s.Unary(op="-", operand=expr)
    with pytest.raises(EvaluationError, match="levels"):
        evaluate(expr, Constants())


def test_constants() -> None:
    assert constant("2 * 8") == 16
    for text in ("a", "(", "1 / 0"):
        with pytest.raises(ValueError):
            constant(text)
