"""A file with all it uses: found, resolved, checked by name and type, and carried by JSON."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from graphpatch.lang import library
from graphpatch.lang import syntax as s
from graphpatch.lang.diagnostics import RuleError
from graphpatch.lang.formatter import format_rules
from graphpatch.lang.library import LIBRARY, packaged
from graphpatch.lang.parser import parse_rules
from graphpatch.lang.program import Program, Setting, load_program, parse_program
from graphpatch.lang.values import check_type
from tests import strategies


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / f"{name}.rules").write_text(text, encoding="utf-8")
    return folder / "main.rules"


def refusal(text: str, params: dict[str, Any] | None = None) -> list[tuple[str, str, str]]:
    """Code, what the caret points at, and the advice, of all that is wrong with a text."""
    with pytest.raises(RuleError) as caught:
        parse_program(text, params)
    found = []
    for d in caught.value.diagnostics:
        if d.places:
            place = d.places[0]
            line = text.split("\n")[place.span.line - 1]
            found.append(
                (d.code, line[place.span.column - 1 : place.span.end_column - 1], place.label or "".join(d.fixes))
            )
        else:
            found.append((d.code, "", " ".join((*d.text, *d.fixes))))
    return found


# ── finding files ──


def test_packaged_names() -> None:
    assert {"roles", "lora"} <= set(packaged())
    program = load_program("lora")
    assert program.files[0].packaged and program.files[0].name == "lora.rules"
    assert load_program(LIBRARY / "lora.rules").files[0].rules == program.files[0].rules
    assert load_program(str(LIBRARY / "lora.rules")).files[0].text == program.files[0].text


def test_every_packaged_file_is_sound() -> None:
    for name in packaged():
        assert load_program(name, complete=False).files


def test_packages_in_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gemma").mkdir()
    (tmp_path / "gemma" / "two.rules").write_text("alias x = y")
    monkeypatch.setattr(library, "LIBRARY", tmp_path)
    assert packaged() == ["gemma.two"]
    assert parse_program("use gemma.two patch @x with lora").files[1].name == "gemma/two.rules"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("lroa", "did you mean `lora`?"),
        ("zzzzzz", "there are "),
        ("nowhere/lora.rules", "did you mean `lora`?"),
        ("patch a with b\n", "graphpatch.parse(text)"),
        ("", "there is no rule file"),
        ("x" * 5000, "no packaged rules"),
        ("x/" * 5000, "there is no rule file"),
    ],
)
def test_missing_files(name: str, says: str) -> None:
    with pytest.raises(RuleError, match=r"GP21[01]") as caught:
        load_program(name)
    assert says in str(caught.value)


def test_paths_are_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub", b='use "../c.rules" alias b = @c')
    main = write(tmp_path, main='use "sub/b.rules" patch @b with lora', c="alias c = q_proj")
    assert [Path(f.name).name for f in load_program(main).files] == ["main.rules", "b.rules", "c.rules"]
    monkeypatch.chdir(tmp_path)
    assert [f.name for f in load_program("main.rules").files] == ["main.rules", "sub/b.rules", "c.rules"]
    assert refusal(f'use "{tmp_path}/main.rulez"')[0][2] == "did you mean `main.rules`?"
    assert refusal('use "main.rules"') == [
        ("GP211", '"main.rules"', "a text that is no file has no folder: write an absolute path")
    ]
    assert refusal("use main.rules")[0][2] == 'a path stands in quotes: use "main.rules"'
    assert refusal(f'use "{tmp_path}/sub"')[0][0] == "GP211"


def test_mistakes_in_a_used_file_are_its_own(tmp_path: Path) -> None:
    main = write(tmp_path, main='use "b.rules" patch @nothing with', b="patch a, b with x")
    with pytest.raises(RuleError) as caught:
        load_program(main)
    found = [(d.code, Path(d.places[0].source.name).name) for d in caught.value.diagnostics]
    assert found == [("GP101", "main.rules")]
    main = write(tmp_path, main='use "b.rules" patch @nothing with c', b="patch a, b with x")
    with pytest.raises(RuleError) as caught:
        load_program(main)
    assert [Path(d.places[0].source.name).name for d in caught.value.diagnostics] == ["b.rules"]


# ── use ──


def test_statements_of_a_used_file_stand_where_it_is_first_used(tmp_path: Path) -> None:
    main = write(
        tmp_path,
        main='freeze a\nuse "b.rules"\nfreeze c\nuse "d.rules"\nuse "b.rules"',
        b="freeze b",
        d='use "b.rules" freeze d',
    )
    program = load_program(main)
    names = [statement.selector.branches[0].steps[0].name for _, statement in program.statements()]  # type: ignore[union-attr]
    assert names == ["a", "b", "c", "d"]
    assert [file for file, _ in program.statements()] == [0, 1, 0, 2]


def test_the_same_use_twice_counts_once_and_another_is_an_error(tmp_path: Path) -> None:
    main = write(tmp_path, main='use "b.rules"(n=1) use "./b.rules"(n=1)', b="param n: int alias b = x")
    assert len(load_program(main).files) == 2
    write(tmp_path, main='use "b.rules"(n=1)\nuse "b.rules"(n=2)')
    with pytest.raises(RuleError, match="GP218") as caught:
        load_program(main)
    assert [place.span.line for place in caught.value.diagnostics[0].places] == [2, 1]


def test_circles_of_use(tmp_path: Path) -> None:
    main = write(tmp_path, main='use "b.rules"', b='use "c.rules"', c='use "b.rules"')
    with pytest.raises(RuleError, match="GP217") as caught:
        load_program(main)
    assert caught.value.diagnostics[0].places[0].source.name.endswith("c.rules")
    with pytest.raises(RuleError, match="GP217"):
        load_program(write(tmp_path, main='use "main.rules"'))


def test_a_long_chain_of_use(tmp_path: Path) -> None:
    write(tmp_path, **{f"f{i}": f'use "f{i + 1}.rules"' for i in range(100)}, main='use "f0.rules"')
    with pytest.raises(RuleError, match="GP217"):
        load_program(tmp_path / "main.rules")


def test_a_file_sees_its_own_names_and_those_it_uses(tmp_path: Path) -> None:
    files = {
        "main": 'use "b.rules" param n: int = 1 patch @b | @c with lora($n, $m)',
        "b": 'use "c.rules" alias b = @c',
        "c": "alias c = x param m: int = 2",
    }
    program = load_program(write(tmp_path, **files))
    assert program.alias(0, "c")[0] == 2 and program.param(0, "m")[0] == 2
    assert program.alias(1, "b")[1].name == "b"
    assert program.visible(1) == {1, 2}
    with pytest.raises(RuleError, match="GP214"):
        program.param(2, "n")
    # c does not use main, so it cannot see what main defines.
    with pytest.raises(RuleError, match="GP213") as caught:
        load_program(write(tmp_path, **{**files, "c": "alias c = @b param m: int = 2"}))
    assert "another file defines it" in str(caught.value)


# ── params ──


def test_where_the_value_of_a_param_comes_from(tmp_path: Path) -> None:
    files = {"main": 'use "b.rules"(n=2 * $k) param k: int = 3', "b": "param n: int = 1 param m: float param o = 5"}
    program = load_program(write(tmp_path, **files), {"m": 4})
    assert program.params == {"m": 4.0} and type(program.params["m"]) is float
    expr, file = program.binding(1, "n")
    assert isinstance(expr, s.Binary) and file == 0  # $k is main's
    assert program.binding(1, "o") == (s.Literal_(value=5), 1)
    assert program.binding(0, "k") == (s.Literal_(value=3), 0)
    assert sorted(program.declared_params()) == [(0, "k"), (1, "m"), (1, "n"), (1, "o")]
    with pytest.raises(RuleError, match="GP215") as caught:
        load_program(tmp_path / "main.rules")
    assert "`m` (float) needs a value" in str(caught.value) and "--set m=" in str(caught.value)
    incomplete = load_program(tmp_path / "main.rules", complete=False)
    assert [d.code for d in incomplete.missing()] == ["GP215"]
    with pytest.raises(RuleError, match="GP215"):
        incomplete.binding(1, "m")
    with pytest.raises(RuleError, match="GP216"):
        load_program(tmp_path / "main.rules", {"m": 1, "n": 1})


@pytest.mark.parametrize(
    ("declared", "value", "taken"),
    [
        (": int", 3, 3),
        (": float", 3, 3.0),
        (": float", 2.5, 2.5),
        (": bool", True, True),
        (": str", "x", "x"),
        (": list", (1, [2, "a"]), [1, [2, "a"]]),
        (": int = none", None, None),
        ("", [1], [1]),
        ("", None, None),
        (": int", Setting("32"), 32),
        (": float", Setting("1e-3"), 0.001),
        (": float", Setting("3"), 3.0),
        (": str", Setting("32"), "32"),
        (": str", Setting("true"), "true"),
        (": bool", Setting("false"), False),
        (": list", Setting("[1, 'a']"), [1, "a"]),
        (": int = none", Setting("none"), None),
        (": str = none", Setting("none"), None),
        ("", Setting("decoder"), "decoder"),
        ("", Setting("32"), 32),
    ],
)
def test_values_that_fit(declared: str, value: Any, taken: Any) -> None:
    program = parse_program(f"param p{declared}", {"p": value})
    assert program.params["p"] == taken and type(program.params["p"]) is type(taken)
    assert Program.from_json(program.model_dump_json()) == program


_LOOP: list[Any] = []
_LOOP.append(_LOOP)


@pytest.mark.parametrize(
    ("declared", "value"),
    [
        (": int", 1.0),
        (": int", True),
        (": int", "3"),
        (": int", None),
        (": bool", 1),
        (": float", "x"),
        (": float", True),
        (": float", float("nan")),
        (": float", float("inf")),
        (": str", 3),
        (": list", "abc"),
        (": int", 2**80),
        ("", object()),
        ("", {"a": 1}),
        ("", "\ud800"),
        (": list", _LOOP),
        (": list", [float("nan")]),
        (": int", Setting("x")),
        (": int", Setting("1.5")),
        (": bool", Setting("1")),
        (": int", Setting("")),
    ],
)
def test_values_that_do_not(declared: str, value: Any) -> None:
    with pytest.raises(RuleError, match="GP205"):
        parse_program(f"param p{declared}", {"p": value})


def test_check_type_points_at_the_expression() -> None:
    program = parse_program("param p: int = 3")
    with pytest.raises(RuleError) as caught:
        check_type(2.5, program.param(0, "p")[1], program.source(0), program.binding(0, "p")[0].span)
    assert "this is a float, 2.5" in str(caught.value) and "<rules>:1:16" in str(caught.value)


# ── names ──


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("use roles patch @qvk with lora", ("GP213", "@qvk", "did you mean `qkv`?")),
        ("patch @qkv with lora", ("GP213", "@qkv", "`use roles` brings the packaged ones")),
        ("param rank: int = 4 patch q with lora(rank=rank)", ("GP207", "rank", "write $rank")),
        ("param rank: int = 4 patch q with lora(rank=2*rank)", ("GP207", "rank", "write $rank")),
        ("param rank = 4 patch q with lora(rank=$rnak)", ("GP226", "$rnak", "did you mean `rank`?")),
        ("patch q with lora(rank=$r)", ("GP226", "$r", "declare it with `param`, or capture an index: layers[i in *]")),
        (
            "patch a[i in *].b with lora where c[$j]",
            ("GP226", "$j", "declare it with `param`, or capture an index: layers[i in *]"),
        ),
        ("patch a[i in *] | b with lora($i)", ("GP225", "$i", "it is used here")),
        ("patch a[i in *].b[i in *] with lora", ("GP223", "[i in *]", "choose another name")),
        ("param i = 1 patch a[i in *] with lora", ("GP223", "[i in *]", "choose another name")),
        (
            "patch a[i in *].b[$i] with lora",
            ("GP226", "$i", "declare it with `param`, or capture an index: layers[i in *]"),
        ),
        (
            "patch a[i in *] with lora expect $i",
            ("GP226", "$i", "declare it with `param`, or capture an index: layers[i in *]"),
        ),
        ("param a = $b param b = $a", ("GP221", "a", "$a -> $b -> $a")),
        ("alias a = x.@b alias b = y | @c alias c = @a", ("GP221", "a", "@a -> @b -> @c -> @a")),
        ("alias a = @a", ("GP221", "a", "@a -> @a")),
        ("param a = 1\nparam a = 2", ("GP219", "a", "choose another name")),
        ("alias a = x\nalias a = y", ("GP219", "a", "choose another name")),
        ("patch a with x as l\nwhen true { patch b with x as l }", ("GP219", "l", "choose another name")),
        ("patch a with x as base patch b with x overrides bsae", ("GP241", "bsae", "did you mean `base`?")),
        ("patch a with x as base overrides base", ("GP240", "base", "name the other rule")),
        (
            "require hidden_size > 3",
            ("GP227", "hidden_size", "quote it if it is text; a model's settings are config.NAME"),
        ),
        ("param n = 3 require n > 3", ("GP227", "n", "write $n")),
        ("require sqrq(3) > 3", ("GP228", "sqrq", "did you mean `sqrt`?")),
        ("require has(@nothing)", ("GP213", "@nothing", "`use roles` brings the packaged ones")),
        ('param n: int = "x"', ("GP205", '"x"', "this is a str, x")),
        ("param n: int = 1.5", ("GP205", "1.5", "this is a float, 1.5")),
        ("param n: bool = 1", ("GP205", "1", "this is an int, 1")),
        ("param n: int = 1 / 0", ("GP229", "0", "")),
        ("use lora(rnak=3)", ("GP214", "rnak", "did you mean `rank`?")),
        ('use lora(rank="x")', ("GP205", '"x"', "this is a str, x")),
        ("alias a = ^b patch c.@a with x", ("GP242", "@a", "put it first")),
        ("alias a = ^b patch ^@a with x", ("GP242", "@a", "put it first")),
        ("alias a = :Linear patch @a.c with x", ("GP242", "@a", "put it last")),
        ("alias a = b[0] patch @a[1] with x", ("GP242", "[1]", "an index needs a role that ends in a plain name")),
        ("alias a = /b/ patch @a.c with x", ("GP242", "@a", "write its names as selectors")),
    ],
)
def test_names_without_meaning(text: str, expected: tuple[str, str, str]) -> None:
    code, caret, advice = expected
    ((got_code, got_caret, got_advice),) = refusal(text)
    assert (got_code, got_caret) == (code, caret)
    assert got_advice.replace('"x"', "x").replace("'x'", "x") == advice


@pytest.mark.parametrize(
    "text",
    [
        "patch a[i in *].b where c[$i] == 3 with lora($i) freeze ** except @new",
        "patch a[i in *] | b[i in 1:] with lora($i)",
        "param n = 2 * $m param m = config.x patch a[$n:] with lora",
        "patch a with replace(eps=eps, x=adapter.bottleneck(dim=3))",
        "map a[i].{b,c}[j] -> d[$i + 1].e using f($j)",
        "alias a = b | c.d alias e = @a[0].@a patch @e.f with x",
        "alias a = :Linear alias b = ^c patch @b.x.@a with x",
        "param hidden: int = 3 patch a where hidden == $hidden with x",
        "when config.model_type in ['a'] { patch a with x as l } patch b with x overrides l",
        "param window: int = none",
        "require config is none",
    ],
)
def test_names_with_meaning(text: str) -> None:
    assert parse_program(text, complete=False).files


def test_unknown_params_of_the_caller() -> None:
    assert refusal("param rank = 1", {"rnak": 3}) == [("GP214", "", "did you mean `rank`?")]
    assert refusal("freeze **", {"x": 3}) == [("GP214", "", "the rules declare no param")]


def test_all_names_are_checked_in_one_go() -> None:
    found = refusal("use roles patch @qvk with lora($x)\nparam n: int = 1.5\npatch @attm with y overrides z")
    assert [code for code, _, _ in found] == ["GP213", "GP226", "GP205", "GP213", "GP241"]


# ── JSON, and rules made in Python ──


def test_json_carries_everything() -> None:
    program = load_program("lora", {"rank": 8})
    again = Program.model_validate_json(program.model_dump_json())
    assert again == program and again.model_dump() == program.model_dump()
    assert Program.from_json(program.model_dump_json()).model_dump() == program.model_dump()
    assert json.loads(program.model_dump_json())["format"] == 1
    assert program.files[0].sha256 == hashlib.sha256(program.files[0].text.encode()).hexdigest()


def _changed(change: Any) -> str:
    data = json.loads(load_program("lora", {"rank": 8}).model_dump_json())
    change(data)
    return json.dumps(data)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "nonsense",
        "[" * 100_000,
        "null",
        b"\xff",
        _changed(lambda d: d.update(format=2)),
        _changed(lambda d: d.update(files=[])),
        _changed(lambda d: d.update(extra=1)),
        _changed(lambda d: d["params"].update(rank="x")),
        _changed(lambda d: d["params"].update(nothing=1)),
        _changed(lambda d: d["files"][0].update(text="freeze **")),
        _changed(lambda d: d["files"][0].update(text="patch a, b")),
        _changed(lambda d: d["files"][0].update(sha256="0" * 64)),
        _changed(lambda d: d["files"][0].update(uses=[0])),
        _changed(lambda d: d["files"][0].update(uses=[7])),
        _changed(lambda d: d["files"][0].update(uses=[])),
        _changed(lambda d: d["files"][0]["rules"]["statements"].clear()),
    ],
)
def test_what_is_no_program(text: str | bytes) -> None:
    with pytest.raises(RuleError):
        Program.from_json(text)


def test_rules_made_in_python() -> None:
    rules = s.RuleFile(
        statements=(
            s.Param(name="rank", type="int", default=s.Literal_(value=8)),
            s.Patch(
                selector=s.SelectorUnion(branches=(s.PathSelector(steps=(s.Step(name="q_proj"),)),)),
                ops=(s.OpCall(name="lora", args=(s.Arg(name="rank", value=s.Var(name="rank")),)),),
            ),
        )
    )
    program = Program.of(rules, {"rank": 4})
    assert program.files[0].rules == rules
    assert program.files[0].text == format_rules(rules)
    assert program.files[0].rules.statements[1].span is not None  # a place in the formatted text
    bare = {"files": [{"name": "notebook", "text": "", "sha256": "", "rules": json.loads(rules.model_dump_json())}]}
    assert Program.from_json(json.dumps(bare)).files[0].rules == rules


@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(strategies.files)
def test_any_rules_are_a_program_or_refused(rules: s.RuleFile) -> None:
    try:
        program = Program.of(rules)
    except RuleError as error:
        assert str(error)
        return
    assert parse_rules(program.files[0].text) == rules
    assert Program.from_json(program.model_dump_json()) == program


def test_of_a_name_that_a_packaged_file_has_too_ones_own_is_to_be_changed():
    with pytest.raises(RuleError) as caught:
        parse_program("use roles\nalias qkv = x")
    (finding,) = caught.value.diagnostics
    assert finding.code == "GP219"
    assert [place.source.name for place in finding.places] == ["<rules>", "roles.rules"]
