"""Remarks: three habits that work and could be said better, each at its place; nothing else is remarked on."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from graphpatch.lang.diagnostics import Source
from graphpatch.lang.parser import parse_rules, parse_selector
from graphpatch.lang.program import LIBRARY, Program, parse_program
from graphpatch.lang.style import style


def remarks(text: str) -> list[tuple[str, str, str]]:
    found = style(parse_rules(text), Source("x", text))
    assert all(d.severity == "style" for d in found)
    return [
        (d.code, text[d.places[0].span.column - 1 : d.places[0].span.end_column - 1], d.places[0].label) for d in found
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("patch {q,k,q}_proj with x", [("GP301", "q", "drop one")]),
        ("patch {a,b}.{c,d,c} with x", [("GP301", "c", "drop one")]),
        ("patch a | b | a with x", [("GP301", "a", "drop one")]),
        ("patch a with x expect >= 1", [("GP302", "expect >= 1", "drop it")]),
        (
            r"patch /model\.layers\.\d+\.mlp/ with x",
            [("GP303", r"/model\.layers\.\d+\.mlp/", "write ^model.layers[*].mlp")],
        ),
        (r"patch /.*\.(q|k)_proj/:Linear with x", [("GP303", r"/.*\.(q|k)_proj/:Linear", "write {q,k}_proj:Linear")]),
        ("patch a with x expect >= 1 per b", []),
        (r"patch /model\.layers\.[0-9]+\..*/ with x", []),
        (r"patch /a.*\.b/ with x", []),
        ("patch {q,k}_proj.{q,k} | q with x expect 2", []),
    ],
)
def test_remarks(text: str, expected: list[tuple[str, str, str]]) -> None:
    assert remarks(text) == expected


def test_what_is_offered_for_a_regex_is_a_selector() -> None:
    (remark,) = remarks(r"patch /model\.layers\.\d+\.(?:attn|mlp)\.x/ with x")
    assert parse_selector(remark[2].removeprefix("write "))
    assert re.fullmatch(r"model\.layers\.\d+\.(?:attn|mlp)\.x", "model.layers.3.mlp.x")


def test_packaged_files_are_in_style() -> None:
    for path in LIBRARY.rglob("*.rules"):
        text = path.read_text(encoding="utf-8")
        assert style(parse_rules(text), Source(path.name, text)) == []


def test_a_program_remarks_on_its_own_files(tmp_path: Path) -> None:
    program = parse_program("use roles patch {q,q} with x")
    assert [d.code for d in program.style()] == ["GP301"]
    assert [d.code for d in Program.of(program.files[0].rules.model_copy()).style()] == ["GP301"]
