"""How long graphpatch takes to start, each time in a fresh process: wall seconds, the least of several runs.

python benchmarks/cold_start.py
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

from table import row

ROOT = Path(__file__).resolve().parents[1]
CACHE = tempfile.TemporaryDirectory()
RULES = """
param rank: int = 16
patch layers[*].self_attn.{q,k,v,o}_proj with lora(rank=$rank, alpha=2*$rank) expect 4 per layers[*]
freeze ** except @new
"""


def main() -> None:
    bare = python("pass")
    peers = python("import lark, pydantic")
    row("python -c pass", bare)
    row("import lark, pydantic", peers)
    row("import graphpatch", python("import graphpatch"))
    row("import graphpatch, parse a rule file", python(f"import graphpatch; graphpatch.parse({RULES!r})"))
    row("import torch", python("import torch", repeats=3))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "lora.rules")
        file.write_text(RULES)
        row("graphpatch check lora.rules", wall("-m", "graphpatch.cli", "check", str(file)), "s", "at most 0.25")


def python(code: str, repeats: int = 9) -> float:
    return wall("-c", code, repeats=repeats)


def wall(*arguments: str, repeats: int = 9) -> float:
    """Least wall seconds of `python ARGUMENTS`."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONPYCACHEPREFIX": CACHE.name}
    # An installed package has its bytecode; so the first run makes it, here too.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    seconds = []
    for _ in range(repeats):
        start = perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True, env=environment)
        seconds.append(perf_counter() - start)
    return min(seconds)


if __name__ == "__main__":
    main()
