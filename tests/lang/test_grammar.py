"""The grammar has no conflicts, its compiled form is that of its text, and reading it is all that a check costs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import lark
import pytest

from graphpatch.lang import grammar as module
from graphpatch.lang.compile import compiled
from graphpatch.lang.grammar import COMPILED, compile_grammar, grammar, heading
from graphpatch.lang.parser import parse_rules

JOBS = Path(__file__).with_name("jobs.rules.txt").read_text(encoding="utf-8").split("###", 1)[1]


def test_strict() -> None:
    """LALR without conflicts, and no word that two terminals could match in one place; raises otherwise."""
    assert compile_grammar(strict=True).rules


def test_the_compiled_form_is_that_of_the_text() -> None:
    head = COMPILED.read_bytes().partition(b"\n")[0]
    assert head == heading(), "python -m graphpatch.lang.compile"
    fresh = compile_grammar()
    assert [str(rule) for rule in grammar().rules] == [str(rule) for rule in fresh.rules]
    assert [str(t.pattern) for t in grammar().terminals] == [str(t.pattern) for t in fresh.terminals]
    for job in JOBS.split("###"):
        assert grammar().parse("#" + job, start="start") == fresh.parse("#" + job, start="start")


def test_another_lark_makes_its_own_tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    other = tmp_path / "tables"
    other.write_bytes(compiled().replace(lark.__version__.encode(), b"0.0.0", 1))
    for content in (other.read_bytes(), b"", b"lark 0.0\n\x80garbage", heading() + b"\n\x80\x04broken"):
        other.write_bytes(content)
        monkeypatch.setattr(module, "COMPILED", other)
        grammar.cache_clear()
        assert len(parse_rules("patch a with b freeze **").statements) == 2
    grammar.cache_clear()


def test_checking_needs_neither_torch_nor_the_grammar_compiler() -> None:
    code = """
import sys
from graphpatch.lang.program import load_program, parse_program
load_program("lora")
parse_program("use roles patch @qkv with lora(rank=16) freeze ** except @new")
from graphpatch.lang.syntax import Patch
heavy = {"torch", "numpy", "transformers", "typer", "rich"} & set(sys.modules)
print(sorted(heavy), "__pydantic_validator__" in Patch.__dict__ and type(Patch.__pydantic_validator__).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # MockValSer: pydantic's schema of the syntax was never built.
    assert done.stdout.strip() == "[] MockValSer"
