"""What the parser makes of good texts, where it says things stand, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest

from graphpatch.lang import syntax as s
from graphpatch.lang.diagnostics import RuleError, Span
from graphpatch.lang.parser import parse_expression, parse_rules, parse_selector, parse_value

TEXT = """# a comment
use softcap(cap=30)
param rank: int = 16
patch ^model.layers[i in -8:].{q, k}_proj:{Linear,Conv1D} | "to q"
  with lora(rank=$rank, alpha=2*$rank) then scale
  except @tower
  expect >= 4 per layers[*]
  as late overrides base, other
train bias as biases
"""


def at(span: Span | None, text: str = TEXT) -> str:
    """The text of a span."""
    assert span is not None
    lines = text.split("\n")[span.line - 1 : span.end_line]
    lines[-1] = lines[-1][: span.end_column - 1]
    lines[0] = lines[0][span.column - 1 :]
    return "\n".join(lines)


def test_what_a_rule_is() -> None:
    patch = parse_rules(TEXT).statements[2]
    assert isinstance(patch, s.Patch)
    first, second = patch.selector.branches
    assert isinstance(first, s.PathSelector) and first.anchored and first.cls == "{Linear,Conv1D}"
    model, layers, proj = first.steps
    assert (model.name, layers.name, proj.name) == ("model", "layers", "{q,k}_proj")
    assert layers.index == s.Index(capture="i", spans=(s.Range(start=s.Literal_(value=-8)),))
    assert second == s.PathSelector(steps=(s.Step(kind="quoted", name="to q"),))
    assert [op.name for op in patch.ops] == ["lora", "scale"]
    assert patch.ops[0].args[0] == s.Arg(name="rank", value=s.Var(name="rank"))
    assert patch.expect is not None
    assert (patch.expect.cmp, patch.expect.count, patch.expect.any) == (">=", s.Literal_(value=4), False)
    assert (patch.label, patch.overrides) == ("late", ("base", "other"))


def test_everything_has_its_place() -> None:
    file = parse_rules(TEXT)
    use, param, patch, train = file.statements
    assert isinstance(use, s.Use) and isinstance(param, s.Param) and isinstance(patch, s.Patch)
    assert isinstance(train, s.Freeze)
    assert at(use.target_span) == "softcap" and at(use.args[0].span) == "cap=30" and at(use.args[0].name_span) == "cap"
    assert at(param.name_span) == "rank"
    first, second = patch.selector.branches
    assert isinstance(first, s.PathSelector)
    assert at(first.span) == "^model.layers[i in -8:].{q, k}_proj:{Linear,Conv1D}" and at(second.span) == '"to q"'
    assert [at(step.span) for step in first.steps] == ["model", "layers[i in -8:]", "{q, k}_proj"]
    assert at(first.steps[1].name_span) == "layers"
    assert first.steps[1].index is not None and at(first.steps[1].index.span) == "[i in -8:]"
    assert [at(x) for x in first.steps[2].alternative_spans] == ["q", "k"]
    assert at(first.cls_span) == "{Linear,Conv1D}" and [at(x) for x in first.cls_alternative_spans] == [
        "Linear",
        "Conv1D",
    ]
    op = patch.ops[0]
    assert at(op.span) == "lora(rank=$rank, alpha=2*$rank)" and at(op.name_span) == "lora"
    assert [at(arg.name_span) for arg in op.args] == ["rank", "alpha"] and at(op.args[1].value.span) == "2*$rank"
    assert patch.expect is not None and at(patch.expect.span) == "expect >= 4 per layers[*]"
    assert at(patch.label_span) == "late" and [at(x) for x in patch.overrides_spans] == ["base", "other"]
    assert at(train.label_span) == "biases"


def test_spans_over_lines_and_parentheses() -> None:
    text = "patch {q,\n   k}_proj with lora(a=(-2) ** 2, b=1 + (2 * 3))"
    patch = parse_rules(text).statements[0]
    assert isinstance(patch, s.Patch)
    (path,) = patch.selector.branches
    assert isinstance(path, s.PathSelector)
    assert [at(x, text) for x in path.steps[0].alternative_spans] == ["q", "k"]
    assert at(path.span, text) == "{q,\n   k}_proj"
    assert [at(arg.value.span, text) for arg in patch.ops[0].args] == ["(-2) ** 2", "1 + (2 * 3)"]


def _spans(node: Any, inside: Span | None = None) -> None:
    """Every node has a span, and it lies within that of the node above."""
    if isinstance(node, s.Node):
        assert node.span is not None, node
        if inside is not None:
            assert inside[:2] <= node.span[:2] and node.span[2:] <= inside[2:], node
        for name in type(node).model_fields:
            if "span" not in name or name == "spans":
                _spans(getattr(node, name), node.span)
    elif isinstance(node, tuple) and not isinstance(node, Span):
        for item in node:
            _spans(item, inside)


def test_every_node_has_a_span_within_its_parents() -> None:
    _spans(parse_rules(TEXT))
    _spans(
        parse_rules(
            'when has(a | b) and x[1] in [1, -2] { map a[i].{b,c} -> x["n"].d[$i + 1] using f(g(1), 2 if a else b) }'
        )
    )


@pytest.mark.parametrize(
    "data", [TEXT.encode(), "\ufeff".encode() + TEXT.encode(), TEXT.replace("\n", "\r\n").encode()]
)
def test_bom_and_crlf_change_nothing(data: bytes) -> None:
    assert parse_rules(data) == parse_rules(TEXT)
    assert parse_rules(data).statements[2].span == parse_rules(TEXT).statements[2].span


def test_newlines_carry_no_meaning() -> None:
    lines = [line for line in TEXT.split("\n") if not line.startswith("#")]
    assert parse_rules(" ".join(lines)) == parse_rules("\n\n".join(lines)) == parse_rules(TEXT)


def test_clauses_in_any_order() -> None:
    import itertools

    clauses = ["with lora", "where a > 1", "except b", "expect 4 per q", "as x", "overrides y"]
    rules = {hash(parse_rules("patch a " + " ".join(order))) for order in itertools.permutations(clauses)}
    assert len(rules) == 1


@pytest.mark.parametrize("word", sorted(s.KEYWORDS))
def test_keywords_may_be_segments_and_not_names(word: str) -> None:
    path = parse_selector(f"{word}.{word}[0].{word}").branches[0]
    assert isinstance(path, s.PathSelector) and [step.name for step in path.steps] == [word] * 3
    anchored = parse_selector(f"^{word}").branches[0]
    assert isinstance(anchored, s.PathSelector) and anchored.anchored and anchored.steps[0].name == word
    for text in (f"param {word}", f"alias {word} = a", f"patch a with b as {word}"):
        with pytest.raises(RuleError) as caught:
            parse_rules(text)
        assert caught.value.code == "GP117"


def test_a_keyword_ends_where_its_word_ends() -> None:
    names = parse_rules(
        "alias patchwork = withs | trained freeze nonexistent where trueish and notable == nonesuch"
    ).statements
    assert len(names) == 2
    with pytest.raises(RuleError):
        parse_rules("patch a without lora")


def test_literal_indices_are_segments() -> None:
    path = parse_selector("model.layers.0.self_attn.q_proj").branches[0]
    assert isinstance(path, s.PathSelector) and path.steps[2] == s.Step(name="0")


def test_regex_slashes() -> None:
    regex = parse_selector(r"/a\/b\.\d+/:Linear").branches[0]
    assert regex == s.RegexSelector(pattern=r"a/b\.\d+", cls="Linear")


def test_inf_and_nan_are_names() -> None:
    assert parse_expression("inf") == s.Name(name="inf") and parse_expression("nan") == s.Name(name="nan")


def test_strings() -> None:
    assert parse_expression(r'"a\"\\\n\t\x41\u00e9\U0001F600\'"') == s.Literal_(value="a\"\\\n\tA\u00e9\U0001f600'")
    assert parse_expression("'say \"x\"'") == s.Literal_(value='say "x"')


@pytest.mark.parametrize(
    ("text", "type", "value"),
    [
        ("32", "int", 32),
        ("-3", "int", -3),
        ("1e-3", "float", 1e-3),
        ("true", "bool", True),
        ("decoder", "str", "decoder"),
        ("32", "str", "32"),
        ("true", "str", "true"),
        ('"32"', "str", "32"),
        ("it's", "str", "it's"),
        ("", "str", ""),
        ("[1, [2.0, 'a'], none]", "list", [1, [2.0, "a"], None]),
        ("cuda:0", None, "cuda:0"),
        ("./a/b", None, "./a/b"),
        ("16", None, 16),
        ("'16'", None, "16"),
        ("+3", "int", 3),
    ],
)
def test_values(text: str, type: str | None, value: object) -> None:
    got = parse_value(text, type)
    assert got == value and repr(got) == repr(value)


@pytest.mark.parametrize(
    ("text", "type"), [("a b", "int"), ("1 + 1", "int"), ("$x", "int"), ("[a]", "list"), ("(", "list"), ("", "int")]
)
def test_what_is_no_value(text: str, type: str) -> None:
    with pytest.raises(RuleError):
        parse_value(text, type)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"patch q with lora\nparam a = \xff", "line 2 is not UTF-8: byte 0xff at offset 28"),
        (b"patch q\n\n\0", "line 3 has a NUL byte"),
        ("patch \ud800", "line 1 has a character that UTF-8 cannot hold"),
        (b"#" * 10_000_000, "at most 250,000 characters; this one has more"),
    ],
)
def test_what_is_no_text(data: str | bytes, says: str) -> None:
    with pytest.raises(RuleError) as caught:
        parse_rules(data)
    assert caught.value.code == "GP100" and says in str(caught.value)


HOSTILE = {
    "parentheses": "require " + "(" * 100_000,
    "lists": "require " + "[" * 59 + "]" * 59,
    "not": "require " + "not " * 50_000 + "a",
    "minus": "require " + "-" * 100_000 + "1",
    "sum": "require 1" + "+1" * 100_000,
    "sum of 60": "require 1" + "+1" * 60,
    "power": "require 1" + "**1" * 50_000,
    "if": "require " + "1 if 1 else " * 15_000 + "1",
    "items": "require a" + "[1]" * 70_000,
    "when": "when 1 {" * 20_000,
    "dots": "patch " + "a." * 100_000 + "a with x",
    "spans": "patch a[" + "1," * 100_000 + "1] with x",
    "braces": "patch {" + "a," * 100_000 + "a} with x",
    "garbage": "@@@@ $$ %% \n" * 10_000,
    "mistakes": "patch a, b with x\n" * 10_000,
    "string": 'patch "' + "x" * 200_000,
    "regex": "patch /" + "(" * 400 + ")" * 400 + "/ with x",
    "repeats": "patch /" + "(a{0,99})" * 50 + "{0,99}/ with x",
    "integer": "param a = " + "9" * 5000,
    "float": "param a = 1e999",
    "calls": "require " + "f(" * 59 + ")" * 59,
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_texts_get_a_short_answer(text: str) -> None:
    # These took from ten seconds to forever before there were limits.
    with pytest.raises(RuleError) as caught:
        parse_rules(text)
    assert 1 <= len(caught.value.diagnostics) <= 30
    assert len(str(caught.value)) < 30_000


def test_depth_just_within_the_limits() -> None:
    file = parse_rules("require " + "(" * 40 + "[" * 15 + "1" + "]" * 15 + ")" * 40 + "\nrequire 1" + "+1" * 45)
    nested = parse_rules("when 1 { " * 30 + "require " + "-" * 45 + "a" + " }" * 30)
    for rules in (file, nested):
        assert s.RuleFile.model_validate_json(rules.model_dump_json()) == rules
