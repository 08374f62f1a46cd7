"""The house: a room imports only from rooms before it, the first four need no torch, and a file has one idea."""

from __future__ import annotations

import ast
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "graphpatch"
ROOMS = (
    "lang",
    "tree",
    "ops",
    "plan",
    "rewrites",
    "patch",
    "checkpoint",
    "lightning",
    "transformers",
    "megatron",
    "cli",
)
LEAVES = {"lightning", "transformers", "megatron", "cli"}
"""Rooms that nobody imports."""
WITHOUT_TORCH = {"lang", "tree", "ops", "plan"}
TAKE_THE_SNAPSHOT = {PACKAGE / "tree" / name for name in ("snapshot.py", "looks.py")}
LONG, LIMIT = 350, 750
"""Lines from which on a file probably has a second idea, and surely has one."""

FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0]


def imports(file: Path) -> Iterator[tuple[str, bool]]:
    """Absolute names of the modules a file imports, and whether a type checker alone reads the import."""
    package = (*file.relative_to(PACKAGE.parent).parent.parts,)
    for node, typing_only in walk(ast.parse(file.read_text("utf-8")), False):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, typing_only
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*above, *filter(None, [node.module])))
            yield module, typing_only
            for alias in node.names:
                yield f"{module}.{alias.name}", typing_only


def walk(node: ast.AST, typing_only: bool) -> Iterator[tuple[ast.AST, bool]]:
    yield node, typing_only
    for name, value in ast.iter_fields(node):
        under = typing_only or (
            isinstance(node, ast.If) and name == "body" and "TYPE_CHECKING" in ast.unparse(node.test)
        )
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from walk(child, under)


def name(file: Path) -> str:
    return str(file.relative_to(PACKAGE))


def test_every_room_has_its_place():
    found = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert found <= set(ROOMS)


@pytest.mark.parametrize("file", [file for file in FILES if file.parent != PACKAGE], ids=name)
def test_a_room_imports_only_from_rooms_before_it(file):
    room = room_of(file)
    allowed = {*ROOMS[: ROOMS.index(room)]} - LEAVES | {room}
    # What a method returns may be named for the type checker: `Plan.apply` gives a `Patch`.
    inside = [module.split(".") for module, typing_only in imports(file) if not typing_only]
    entered = {parts[1] for parts in inside if parts[0] == "graphpatch" and len(parts) > 1}
    assert entered & set(ROOMS) <= allowed


@pytest.mark.parametrize(
    "file", [file for file in FILES if room_of(file) in WITHOUT_TORCH and file not in TAKE_THE_SNAPSHOT], ids=name
)
def test_the_first_rooms_import_no_torch(file):
    assert not [m for m, typing_only in imports(file) if m.split(".")[0] == "torch" and not typing_only]


def test_importing_graphpatch_and_parsing_rules_imports_no_torch():
    program = """
import sys, graphpatch
assert "torch" not in sys.modules, "import graphpatch"
graphpatch.parse("use roles\\npatch @qkv with lora(rank=8)\\nfreeze ** except @new")
assert "torch" not in sys.modules, "graphpatch.parse"
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert run.returncode == 0, run.stderr


def test_public_names_exist():
    import graphpatch

    assert [name for name in graphpatch.__all__ if not hasattr(graphpatch, name)] == []


@pytest.mark.filterwarnings("default")
def test_files_have_one_idea():
    lengths = {name(file): len(file.read_text("utf-8").splitlines()) for file in FILES}
    for file, lines in lengths.items():
        if lines > LONG:
            warnings.warn(f"graphpatch/{file} has {lines} lines: is there a second idea in it?", stacklevel=1)
    assert max(lengths.values()) <= LIMIT
