"""What is said about what people write first: `mistakes.txt` holds texts, each with the answer word for word.

`python -m tests.lang.test_mistakes` writes the answers anew; read the difference before you commit it.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from graphpatch.lang import build, build_expressions, expected, mistakes, parser
from graphpatch.lang.diagnostics import RuleError
from graphpatch.lang.parser import parse_rules

FILE = Path(__file__).with_name("mistakes.txt")


def read() -> list[tuple[str, str]]:
    blocks = re.split(r"^>>> ", FILE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return [(block.split("\n", 1)[0], block.split("\n", 1)[1].strip("\n")) for block in blocks]


def answer(case: str) -> str:
    try:
        parse_rules(case.replace("\\n", "\n"), "lora.rules")
    except RuleError as error:
        return str(error)
    return "fine"


@pytest.mark.parametrize(("case", "said"), read(), ids=[case for case, _ in read()])
def test_answer(case: str, said: str) -> None:
    assert answer(case) == said


def test_no_word_of_the_parser_reaches_the_user() -> None:
    said = "\n".join(said for _, said in read())
    assert not re.search(r"\b(VBAR|LPAR|SEGMENT|DOTTED|__ANON|\$END|Token|lark|terminal)\b", said)


def test_every_code_of_the_parser_has_an_example() -> None:
    sources = "".join(
        Path(str(module.__file__)).read_text(encoding="utf-8")
        for module in (build, build_expressions, expected, mistakes, parser)
    )
    codes = set(re.findall(r'"(GP1\d\d|GP206)"', sources)) - {
        "GP100",
        "GP133",
    }  # of bytes and of values: tested elsewhere
    said = "\n".join(said for _, said in read())
    assert {code for code in codes if code not in said} == set()


# The heart of the matter, stated by hand and not by what the program said once: the code, what the caret points at, and the
# fix.
BY_HAND = [
    ("patch q with lora(bias=True)", "GP105", "True", "true"),
    ("patch q with lora(bias=None)", "GP105", "None", "none"),
    ("patch q where a && b with x", "GP106", "&&", "and"),
    ("patch q where a || b with x", "GP106", "||", "or"),
    ("patch q where !a with x", "GP106", "!", "not"),
    ("patch a, b with x", "GP107", ",", "|"),
    ("patch a > b with x", "GP108", ">", "a.b"),
    ("patch a with x;", "GP109", ";", "drop it"),
    ("when a { patch b with x } else { patch c with x }", "GP110", "else", "when not"),
    ("patch layers[0..11].q with x", "GP104", "0..11", "0:12"),
    ("patch layers[0-11].q with x", "GP104", "0-11", "0:12"),
    ("- match: q_proj", "GP111", "- match: q_proj", "patch layers"),
    ("patch q where a = 1 with x", "GP112", "=", "=="),
    ('patch "model.layers.*.q" with x', "GP113", '"model.layers.*.q"', "write model.layers.*.q"),
    ("patch .*q_proj$ with x", "GP114", ".*q_proj$", "write q_proj"),
    (r"patch layers\.\d+\.q with x", "GP114", r"layers\.\d+\.q", r"/layers\.\d+\.q/"),
    ("patch (q|k)_proj with x", "GP114", "(q|k)_proj", "{q,k}_proj"),
    ("patch q lora(rank=16)", "GP115", "lora", "with lora"),
    ("patch q wiht lora", "GP125", "wiht", "`with`"),
    ("pach q with lora", "GP125", "pach", "`patch`"),
    ("patch q with lora(rank=16", "GP103", "(", "`)`"),
    ('patch q with lora(init="gauss)', "GP102", '"gauss)', "close it"),
]


@pytest.mark.parametrize(("text", "code", "caret", "fix"), BY_HAND, ids=[text for text, *_ in BY_HAND])
def test_by_hand(text: str, code: str, caret: str, fix: str) -> None:
    with pytest.raises(RuleError) as caught:
        parse_rules(text)
    (finding,) = caught.value.diagnostics
    assert finding.code == code
    place = finding.places[0]
    assert text[place.span.column - 1 : place.span.end_column - 1] == caret
    assert fix in place.label or any(fix in line for line in finding.fixes)


def test_all_mistakes_of_a_file_are_reported_and_what_is_right_between_them_is_read() -> None:
    text = """patch a, b with x
patch good with lora(rank=16)
when config.x && y {
  patch c > d with x
  patch e with x where with
  freeze f
}
patch g with lora(r=3,
freeze ** excpt @new
param True
train h;
patch /(a+)+/ with x
"""
    with pytest.raises(RuleError) as caught:
        parse_rules(text)
    found = [(d.code, d.places[0].span.line) for d in caught.value.diagnostics]
    assert found == [
        ("GP107", 1),
        ("GP106", 3),
        ("GP108", 4),
        ("GP117", 5),
        ("GP103", 8),
        ("GP125", 9),
        ("GP117", 10),
        ("GP109", 11),
        ("GP122", 12),
    ]


if __name__ == "__main__":
    FILE.write_text("".join(f">>> {case}\n{answer(case)}\n\n" for case, _ in read()), encoding="utf-8")
