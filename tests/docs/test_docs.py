"""What docs/ and the README say is so: blocks parse, selectors match, examples run, generated pages are current."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from graphpatch import Tree, parse
from graphpatch.lang.parser import parse_rules
from graphpatch.plan.select import matches
from graphpatch.tree.compress import compress

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(kind: str) -> list:
    """Every fenced block of a kind, as (page, line, text)."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in re.finditer(rf"^```{kind}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            line = text[: block.start()].count("\n") + 1
            found.append(pytest.param(block[1], id=f"{page.name}:{line}"))
    return found


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("text", blocks("rules"))
def test_every_rule_block_parses(text):
    assert parse_rules(text, "block").statements


def selectors() -> list:
    lines = [(block.id, line) for block in blocks("selectors") for line in block.values[0].splitlines() if line]
    return [pytest.param(*re.split(r" {2,}", line, maxsplit=1), id=line.split("  ")[0]) for _, line in lines]


@pytest.fixture(scope="module")
def little() -> Tree:
    return Tree.read(str(ROOT / "docs" / "little.tree"))


@pytest.mark.parametrize(("selector", "matched"), selectors())
def test_every_selector_matches_what_the_page_says(little, selector, matched):
    _, hits = matches(little, selector)
    assert compress(little, hits.nodes, hits.parameters) == matched.split(" | ")
    # And what is said to be matched, read as a selector, matches the same.
    _, again = matches(little, matched)
    assert (again.nodes, again.parameters) == (hits.nodes, hits.parameters)


def test_there_are_selectors_of_every_kind():
    kinds = ["^", "**", "{", "|", "[", ":", "@", "/", ".weight"]
    texts = [parameters.values[0] for parameters in selectors()]
    assert all(any(kind in text for text in texts) for kind in kinds)


def run_python(page: Path) -> None:
    code = "\n".join(re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL))
    assert code
    exec(compile(code, page.name, "exec"), {"__name__": "__page__"})


def test_the_examples_of_the_python_page_run(monkeypatch):
    # deepcopy and pickle look a class up by its module.
    monkeypatch.setitem(sys.modules, "__page__", ModuleType("__page__"))
    run_python(ROOT / "docs" / "python.md")


def test_the_examples_of_the_transformers_page_run():
    run_python(ROOT / "docs" / "transformers.md")


def test_the_examples_of_the_adapters_page_run():
    run_python(ROOT / "docs" / "adapters.md")


def test_the_examples_of_the_page_on_lora_run():
    run_python(ROOT / "docs" / "lora.md")


def test_the_examples_of_the_peft_page_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_python(ROOT / "docs" / "peft.md")


def test_the_python_example_of_the_readme_runs(tmp_path, monkeypatch):
    from transformers import LlamaConfig, LlamaForCausalLM

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (tmp_path / "lora.rules").write_text(re.search(r"^```rules\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)[1])
    monkeypatch.chdir(tmp_path)
    small = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 64,
    }
    LlamaForCausalLM(LlamaConfig(**generator().LLAMA_8B | small)).save_pretrained("llama")
    run_python(ROOT / "README.md")


def test_the_readme_shows_a_plan_and_a_refusal():
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.findall(r"^```console\n\$ graphpatch (.*?)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert [command for command, _ in shown] == ["plan lora.rules --model ./llama", "plan typo.rules --model ./llama"]
    plan, refusal = (output for _, output in shown)
    assert "128 to rewrite" in plan and "4 x 24" in plan and refusal.startswith("error GP402: `{w}` matches nothing")


def test_the_generated_pages_are_what_they_would_be_generated_as(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    for path, text in generator().pages().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is out of date: make docs"


def test_every_op_has_a_page():
    from graphpatch.ops.registry import find, names

    built_in = {name for name in names() if find(name).__module__.startswith("graphpatch.")}
    assert {p.stem for p in (ROOT / "docs" / "ops").glob("*.md")} - {"README"} == built_in


def test_every_code_in_the_source_has_its_line_in_the_table():
    used = set()
    for path in (ROOT / "graphpatch").rglob("*.py"):
        used |= set(re.findall(r'"(GP\d{3})"', path.read_text(encoding="utf-8")))
    page = (ROOT / "docs" / "diagnostics.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| (GP\d{3}) \| .*\w", page, re.MULTILINE))
    assert used == listed and len(used) > 40


def test_every_statement_of_the_grammar_is_on_the_language_page():
    page = (ROOT / "docs" / "language.md").read_text(encoding="utf-8")
    grammar = (ROOT / "graphpatch" / "lang" / "rules.lark").read_text(encoding="utf-8")
    statements = re.search(r"^\?statement: (.*)$", grammar, re.MULTILINE)[1].split(" | ")
    shown = "\n".join(block.values[0] for block in blocks("rules") if "language" in block.id)
    assert len(statements) == 9 and all(re.search(rf"^\s*{s}\b", shown, re.MULTILINE) for s in statements)
    assert f"?statement: {' | '.join(statements)}" in page


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_file_that_the_pages_speak_of_is_there():
    named = set()
    for page in (ROOT / "docs").glob("*.md"):
        named |= set(
            re.findall(r"`((?:lang|tree|ops|plan|rewrites|patch|cli)/\w+\.py)`", page.read_text(encoding="utf-8"))
        )
    missing = {name for name in named if not (ROOT / "graphpatch" / name).exists()} - {
        "ops/mine.py",
        "rewrites/mine.py",
    }
    assert not missing and len(named) > 15


def test_every_room_is_in_the_table_of_the_house():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rooms = {p.name for p in (ROOT / "graphpatch").iterdir() if (p / "__init__.py").exists()}
    assert rooms == set(re.findall(r"^\| `(\w+)/` \|", page, re.MULTILINE))


def test_the_rule_file_of_the_language_page_plans_on_little_tree(little):
    text = blocks("rules")[[b.id.startswith("language") for b in blocks("rules")].index(True)].values[0]
    assert len(parse(text).plan(little).changes) == 16
