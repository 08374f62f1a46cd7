"""What `graphpatch merge` takes, next to copying the base with `cp`, and to merging it with PEFT.

    python benchmarks/merge_disk.py [--layers 22] [--repeats 3] [--folder DIR] [--quick] [--no-peft]

A Llama of 1.1 B parameters in bfloat16 (2 GiB in one file), LoRA of rank 16 in float32 on all linears of its layers.
Each figure is the median of whole processes, Python's start included; "over importing torch" is less the time of a
process that imports torch and safetensors, and memory is the peak over that process's. The files stay in the page
cache; `--sync` beside `cp` and `sync` says what the disk itself takes. The default size is that of the figures in the
project's goals; `--quick` has 4 layers of 22.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter

from table import row

RANK = 16
IMPORT = "import torch, safetensors.torch"
MAKE = f"""
import sys, torch, graphpatch
from transformers import LlamaConfig, LlamaForCausalLM
torch.set_default_dtype(torch.bfloat16)
config = LlamaConfig(hidden_size=2048, intermediate_size=5632, num_hidden_layers=int(sys.argv[2]),
    num_attention_heads=32, num_key_value_heads=4, vocab_size=32000)
model = LlamaForCausalLM(config)
torch.set_default_dtype(torch.float32)
model.save_pretrained(sys.argv[1] + "/base", max_shard_size="100GB")
patch = graphpatch.apply(model, graphpatch.parse(
    "patch layers[*].**:Linear with lora(rank={RANK}, alpha={2 * RANK})\\nfreeze ** except @new"))
for factor in patch.adapter_state_dict().values():
    factor.normal_(std=0.02)
graphpatch.save_adapter(patch, sys.argv[1] + "/adapter")
graphpatch.to_peft(patch, sys.argv[1] + "/peft")
"""
PEFT = """
import sys, torch, peft
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out, max_shard_size="100GB")
"""


def main() -> None:
    options = arguments()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        python("-c", MAKE, name, str(options.layers))
        measure(options, folder)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", help="on which disk; the temporary folder's by default")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--no-peft", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.layers = 4
    return options


def measure(options: argparse.Namespace, folder: Path) -> None:
    base, adapter, out = (str(folder / name) for name in ("base", "adapter", "out"))
    size = (folder / "base" / "model.safetensors").stat().st_size
    runs: dict[str, Callable[[], tuple[float, float]]] = {
        "import": lambda: python("-c", IMPORT),
        "cp": lambda: process("cp", "-r", base, out),
        "cp and sync": lambda: process("sh", "-c", 'cp -r "$0" "$1" && sync -f "$1" && sync "$1"/*', base, out),
        "graphpatch": lambda: python("-m", "graphpatch.cli", "merge", base, adapter, out),
        "graphpatch, --sync": lambda: python("-m", "graphpatch.cli", "merge", base, adapter, out, "--sync"),
    }
    if not options.no_peft:
        runs["PEFT"] = lambda: python("-c", PEFT, base, str(folder / "peft"), out)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for turn in range(options.repeats + 1):
        for name, run in runs.items():
            figures = run()
            shutil.rmtree(out, ignore_errors=True)
            if turn:  # the first warms up
                found[name].append(figures)
    seconds = {name: median(s for s, _ in values) for name, values in found.items()}
    peaks = {name: median(p for _, p in values) for name, values in found.items()}
    print(f"{size / 2**30:.2f} GiB in bfloat16, {options.layers} layers, {options.repeats} repeats")
    for name in runs:
        row(f"{name}", seconds[name])
    over = seconds["graphpatch"] - seconds["import"]
    row("graphpatch over importing torch", over)
    row("  of cp", over / seconds["cp"], "x", "at most 2")
    synced = seconds["graphpatch, --sync"] - seconds["import"]
    row("  with --sync, of cp and sync", synced / seconds["cp and sync"], "x")
    row("graphpatch, peak over importing torch", (peaks["graphpatch"] - peaks["import"]) / 1024, "GiB", "at most 0.2")
    if "PEFT" in runs:
        row("graphpatch / PEFT", seconds["graphpatch"] / seconds["PEFT"], "x")
        row("PEFT, peak over importing torch", (peaks["PEFT"] - peaks["import"]) / 1024, "GiB")


def python(*arguments: str) -> tuple[float, float]:
    return process(sys.executable, *arguments)


def process(*command: str) -> tuple[float, float]:
    """Seconds, and the peak of its memory in MiB."""
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
    start = perf_counter()
    child = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    seconds = perf_counter() - start
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{' '.join(command)[:200]}: exit code {child.returncode}")
    return seconds, usage.ru_maxrss / 1024


if __name__ == "__main__":
    main()
