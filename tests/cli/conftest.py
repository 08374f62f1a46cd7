"""The command line on small models, run in this process; `tests/cli/test_cold.py` starts processes of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from graphpatch.cli.main import main

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}


class Ran(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def graphpatch(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    """Run a command, and see what it printed."""
    monkeypatch.delenv("GRAPHPATCH_DEBUG", raising=False)
    monkeypatch.delenv("FORCE_COLOR", raising=False)

    def run(*arguments: object) -> Ran:
        try:
            code = main([str(a) for a in arguments])
        except SystemExit as stop:  # argparse
            code = stop.code if isinstance(stop.code, int) else 1
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the config of a small Llama, and no weights."""
    folder = tmp_path_factory.mktemp("llama")
    (folder / "config.json").write_text(json.dumps(LLAMA))
    return folder


@pytest.fixture(scope="session")
def llama_tree(llama: Path) -> Path:
    path = llama / "llama.tree"
    assert main(["tree", "--model", str(llama), "-o", str(path)]) == 0
    return path


@pytest.fixture
def rules(tmp_path: Path) -> Callable[[str], Path]:
    """Write a rule file."""

    def write(text: str, name: str = "my.rules") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return write
