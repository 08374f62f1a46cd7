"""What a command imports, in a process of its own: no torch where none is needed, and no superfluous module."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def imported(*arguments: str) -> set[str]:
    """The modules that are loaded after a command ran."""
    code = "import sys; from graphpatch.cli.main import main; main(sys.argv[1:]); print('\\n@', *sys.modules)"
    ran = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "GRAPHPATCH_DEBUG"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stderr == "", ran.stderr
    return set(ran.stdout.rpartition("\n@ ")[2].split())


@pytest.mark.parametrize("arguments", [["check", "lora", "scaled_embedding"], ["rules"], ["ops", "lora"]])
def test_torch_is_not_imported_without_a_model(arguments):
    modules = imported(*arguments)
    assert "graphpatch.cli.main" in modules
    assert not {"torch", "numpy", "transformers"} & modules


def test_check_imports_nothing_that_it_does_not_need():
    modules = imported("check", "lora")
    assert not {"asyncio", "graphpatch.cli.plan", "graphpatch.cli.huggingface"} & modules


def test_a_plan_from_a_tree_needs_no_torch(llama_tree):
    modules = imported("plan", "lora", "--model", str(llama_tree))
    assert "graphpatch.plan.planner" in modules and "torch" not in modules


def test_a_plan_from_a_config_imports_one_model_and_no_other(llama):
    modules = imported("plan", "lora", "--model", str(llama))
    models = {m.split(".")[2] for m in modules if m.startswith("transformers.models.") and ".modeling_" in m}
    assert models <= {"llama", "auto"} and "graphpatch.patch" not in modules
