import io
import json
import sys

import pytest

CLEAN = "patch q_proj with lora(rank=4)\nfreeze ** except @new\n"


def test_a_clean_file_exits_with_0(graphpatch, rules):
    ran = graphpatch("check", rules(CLEAN))
    assert ran.code == 0 and "nothing found" in ran.out and ran.err == ""


def test_packaged_rules_are_clean(graphpatch):
    names = [line.split()[0] for line in graphpatch("rules").out.splitlines() if line[0] != " "]
    assert "lora" in names and "roles" in names
    assert graphpatch("check", *names).code == 0


def test_findings_exit_with_1_and_show_the_place(graphpatch, rules):
    path = rules("patch q_proj with loraa(rank=4)\n")
    ran = graphpatch("check", path)
    assert ran.code == 1
    assert "GP201" in ran.out and "did you mean `lora`?" in ran.out
    assert f"{path}:1:19" in ran.out
    assert ran.out.splitlines()[-1] == "1 file checked: 1 error"


def test_all_findings_of_all_files_come_at_once(graphpatch, rules):
    one = rules("patch a with lora(rnak=4)\npatch b with lora(rank=0)\n", "one.rules")
    two = rules("patch layers[0..3].q with lora\n", "two.rules")
    ran = graphpatch("check", one, two)
    assert ran.code == 1
    for code in ("GP203", "GP204", "GP104"):
        assert code in ran.out
    assert "3 errors" in ran.out


def test_a_file_alone_may_leave_a_param_open_and_a_plan_may_not(graphpatch, rules, llama_tree):
    path = rules("param rank: int\npatch q_proj with lora(rank=$rank)\n")
    assert graphpatch("check", path).code == 0
    ran = graphpatch("plan", path, "--model", llama_tree)
    assert ran.code == 1 and "--set rank=" in ran.err


def test_style_never_changes_the_exit_code(graphpatch, rules):
    ran = graphpatch("check", rules("patch {q,q}_proj with lora(rank=4)\nfreeze ** except @new\n"))
    assert ran.code == 0 and "style GP301" in ran.out and "1 remark" in ran.out


def test_json_is_clean_and_carries_its_version(graphpatch, rules):
    ran = graphpatch("check", rules("patch q_proj with loraa(rank=4)\n"), "--json")
    body = json.loads(ran.out)
    assert ran.code == 1 and ran.err == "" and body["format"] == 1
    [finding] = body["files"][0]["findings"]
    assert finding["code"] == "GP201" and finding["places"][0]["span"][:2] == [1, 19]


def test_a_missing_file_exits_with_2_and_names_the_nearest(graphpatch, rules):
    path = rules(CLEAN, "llama.rules")
    ran = graphpatch("check", path.with_name("lama.rules"))
    assert ran.code == 2 and "did you mean `llama.rules`?" in ran.err
    assert graphpatch("check", "loar").err.endswith("did you mean `lora`?\n")


def test_a_missing_file_does_not_hide_what_is_wrong_in_another(graphpatch, rules):
    ran = graphpatch("check", "nowhere.rules", rules("patch q_proj with loraa()\n"))
    assert ran.code == 2 and "GP201" in ran.out and "GP701" in ran.err


def test_rules_from_stdin(graphpatch, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"patch q_proj with loraa(rank=4)")))
    ran = graphpatch("check", "-")
    assert ran.code == 1 and "<stdin>:1:19" in ran.out


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"\x00" * 100, b"patch " * 5000, b"(" * 100_000])
def test_whatever_a_file_holds_there_is_no_traceback(graphpatch, tmp_path, content):
    path = tmp_path / "odd.rules"
    path.write_bytes(content)
    ran = graphpatch("check", path)
    assert ran.code == (0 if not content else 1)
    assert "Traceback" not in ran.out + ran.err and "internal error" not in ran.err


@pytest.mark.parametrize("setting", ["rank", "=3", "9x=3", "--set"])
def test_a_setting_that_is_none(graphpatch, rules, setting):
    ran = graphpatch("check", rules("param rank: int = 1\n"), f"--set={setting}")
    assert ran.code == 2 and "NAME=VALUE" in ran.err
