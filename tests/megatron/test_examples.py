"""The examples run, and print what they say they do."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parents[2]


def printed(*command: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    environment["PYTHONPATH"] = str(HERE)
    done = subprocess.run(
        [sys.executable, *command], cwd=HERE, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_gemma_2_from_a_stock_model():
    said = re.search(r"largest logit ([\d.]+), the largest difference (\S+)", printed("examples/megatron_gemma2.py"))
    assert said and float(said[1]) > 1 and float(said[2]) < 1e-5


def test_nemo_s_lora_at_tensor_parallel_size_2():
    losses = re.findall(r"loss ([\d.]+)", printed("examples/megatron_lora.py", "--steps", "12"))
    assert len(losses) >= 3 and float(losses[-1]) < float(losses[0]) and float(losses[0]) > 4.5
