"""Text and JSON are two forms of the same rules: `parse(format(rules)) == rules`, and JSON loses nothing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from graphpatch.lang import syntax as s
from graphpatch.lang.diagnostics import RuleError
from graphpatch.lang.formatter import format_expression, format_rules, format_selector
from graphpatch.lang.parser import parse_expression, parse_rules, parse_selector
from tests import strategies

JOBS = re.split(r"^### (.*)\n", Path(__file__).with_name("jobs.rules.txt").read_text(encoding="utf-8"), flags=re.M)[1:]
SETTINGS = settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))


@SETTINGS
@given(strategies.files)
def test_files(file: s.RuleFile) -> None:
    assert parse_rules(format_rules(file)) == file


@SETTINGS
@given(strategies.expressions)
def test_expressions(expr: s.Expr) -> None:
    assert parse_expression(format_expression(expr)) == expr


@SETTINGS
@given(strategies.unions)
def test_selectors(union: s.SelectorUnion) -> None:
    assert parse_selector(format_selector(union)) == union


@SETTINGS
@given(strategies.files)
def test_formatting_again_changes_nothing(file: s.RuleFile) -> None:
    text = format_rules(file)
    assert format_rules(parse_rules(text)) == text


@SETTINGS
@given(strategies.files)
def test_json(file: s.RuleFile) -> None:
    parsed = parse_rules(format_rules(file))
    again = s.RuleFile.model_validate_json(parsed.model_dump_json())
    assert again == file
    assert again.model_dump() == parsed.model_dump()  # spans too


@pytest.mark.parametrize(("job", "text"), list(zip(JOBS[::2], JOBS[1::2])), ids=JOBS[::2])
def test_every_job_parses_and_comes_back(job: str, text: str) -> None:
    file = parse_rules(text, job)
    assert len(file.statements) == len(
        re.findall(r"^(?:use|param|alias|require|when|patch|freeze|train|map)\b", text, re.M)
    )
    assert parse_rules(format_rules(file)) == file
    assert s.RuleFile.model_validate_json(file.model_dump_json()) == file


@pytest.mark.parametrize(
    "text",
    [
        "-1",
        "-(1)",
        "- -1",
        "(-2) ** 2",
        "-2 ** 2",
        "2 ** -1",
        "2 ** 3 ** 2",
        "(2 ** 3) ** 2",
        "1 - (2 - 3)",
        "(a if b else c) if d else e",
        "a if (b if c else d) else e if f else g",
        "not (a and b) or c",
        "(a < b) < c",
        "a < b < c",
        "not a in b",
        "(not a) in b",
        "a[1][2]",
        "(a + b)[0]",
        "(-1)[0]",
        "-a[0]",
        "f(x=1)[0]",
        "[[], [1, -0.0], 1e-05]",
        "a and b and (c and d)",
    ],
)
def test_precedence_is_pythons(text: str) -> None:
    """The canonical form of each is the text itself, but for what it may spare; and it groups as Python groups."""
    expr = parse_expression(text)
    written = format_expression(expr)
    assert parse_expression(written) == expr
    import ast

    assert ast.dump(ast.parse(written, mode="eval")) == ast.dump(ast.parse(text, mode="eval"))


def test_canonical_form() -> None:
    text = """
patch   layers [ 0 , 5 ,9:12 ] . { q , k }_proj : { Linear,Conv1D } | /a\\/b/ as x expect>=3 per layers[i in*]
except "to q" with lora ( rank = 16 , ) then scale where a==1 and(b or c)
when has(x){freeze ** except@new}
"""
    assert (
        format_rules(parse_rules(text))
        == """patch layers[0, 5, 9:12].{q,k}_proj:{Linear,Conv1D} | /a\\/b/
  where a == 1 and (b or c)
  with lora(rank=16) then scale
  except "to q"
  expect >= 3 per layers[i in *]
  as x

when has(x) {
  freeze ** except @new
}
"""
    )


@pytest.mark.parametrize(
    "node",
    [
        s.Literal_(value=float("inf")),
        s.Literal_(value=float("nan")),
        s.Literal_(value=2**80),
        s.Literal_(value="\ud800"),
        s.Name(name="a b"),
        s.Name(name="none"),
        s.Call(name="has"),
        s.Var(name="a.b"),
    ],
)
def test_what_no_text_can_say_is_refused(node: s.Expr) -> None:
    with pytest.raises(RuleError) as caught:
        format_expression(node)
    assert caught.value.code == "GP134"


def test_selectors_that_no_text_can_say() -> None:
    for path in (
        s.PathSelector(),
        s.PathSelector(cls="a b"),
        s.PathSelector(steps=(s.Step(name="a.b"),)),
        s.PathSelector(steps=(s.Step(kind="quoted", name=""),)),
        s.RegexSelector(pattern=""),
    ):
        with pytest.raises(RuleError):
            format_selector(path)


def test_equality_is_of_meaning() -> None:
    assert parse_selector("a . b") == parse_selector("a.b")
    assert parse_expression("1") != parse_expression("1.0")
    assert parse_expression("1") != parse_expression("true")
    assert parse_expression("0.0") != parse_expression("-0.0")
    assert hash(parse_selector("{a, b}[ 1]")) == hash(parse_selector("{a,b}[1]"))
