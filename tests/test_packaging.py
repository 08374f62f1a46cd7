"""The wheel: all that a user needs is in it, and it finds its own rules where no source tree is near."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(*command: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment or None)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built without a network: hatchling comes with the test extra."""
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out), cwd=ROOT)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A folder that holds what installing the wheel lays down."""
    folder = tmp_path_factory.mktemp("site")
    pip = (sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--no-compile", "--quiet")
    run(*pip, "--target", str(folder), str(wheel), cwd=folder)
    return folder


def test_the_wheel_holds_code_rules_and_grammar(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    assert {f"graphpatch/rules/{file.name}" for file in (ROOT / "rules").glob("*.rules")} <= held
    assert {str(file.relative_to(ROOT)) for file in (ROOT / "graphpatch").rglob("*.py")} <= held
    assert {f"graphpatch/lang/{name}" for name in ("rules.lark", "rules.lark.compiled")} <= held


def test_the_wheel_holds_nothing_else(wheel):
    top = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"graphpatch"}


def test_the_installed_wheel_finds_its_rules(installed, tmp_path):
    program = """
import graphpatch
from pathlib import Path
print(Path(graphpatch.__file__).parent.parent)
print(sorted(type(graphpatch.load(name)).__name__ for name in ("lora", "freeze", "roles")))
"""
    # -P and a foreign working folder: nothing of the source tree may help.
    out = run(sys.executable, "-P", "-c", program, cwd=tmp_path, PYTHONPATH=str(installed))
    assert out.splitlines() == [str(installed), "['RuleSet', 'RuleSet', 'RuleSet']"]


def test_the_installed_command_runs(installed, tmp_path):
    (tmp_path / "my.rules").write_text("use roles\npatch @qkv with lora(rank=8)\nfreeze ** except @new\n")
    program = "import sys; from graphpatch.cli.main import main; sys.exit(main(['check', 'my.rules']))"
    run(sys.executable, "-P", "-c", program, cwd=tmp_path, PYTHONPATH=str(installed))
