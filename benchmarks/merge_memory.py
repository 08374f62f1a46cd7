"""What merging in memory takes, in time and in memory beside the model, next to PEFT's `merge_and_unload`.

    python benchmarks/merge_memory.py [--layers 22] [--repeats 3] [--quick]

A Llama of 1.1 B parameters in bfloat16, LoRA of rank 16 in float32 on all linears of its layers. Each run is a process
of its own; figures are medians, memory is the peak over what the process had when merging began (Linux tells it). The
default size is that of the figures in the project's goals; `--quick` has 4 layers of 22.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from ctypes import CDLL
from pathlib import Path
from statistics import median
from time import perf_counter

from table import row

RANK = 16
VARIANTS = ("graphpatch", "kept", "PEFT")


def main() -> None:
    options = arguments()
    if options.variant:
        print(json.dumps(run(options)))
        return
    found: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    for _ in range(options.repeats):
        for name in VARIANTS:
            found[name].append(child(options, name))
    at = {name: {key: median(r[key] for r in runs) for key in runs[0]} for name, runs in found.items()}
    ours, kept, theirs = (at[name] for name in VARIANTS)
    print(
        f"{ours['parameters'] / 1e9:.2f} B parameters in bfloat16, {options.layers} layers, {options.threads} threads"
    )
    for key, unit in (("seconds", "s"), ("peak", "MiB")):
        row(f"{key}, patch.bake()", ours[key], unit)
        row(f"{key}, patch.merge() with copies for unmerge", kept[key], unit)
        row(f"{key}, PEFT merge_and_unload", theirs[key], unit)
        row("  bake / PEFT", ours[key] / theirs[key], "x", "at most 0.3")
    row("seconds, patch.unmerge()", kept["unmerge"])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.layers = 4
    return options


def child(options: argparse.Namespace, variant: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--variant", variant, "--layers", str(options.layers)]
    command += ["--threads", str(options.threads)]
    text = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True, text=True).stdout
    return json.loads(text)  # type: ignore[no-any-return]


def run(options: argparse.Namespace) -> dict[str, float]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=options.layers, num_attention_heads=32,
        num_key_value_heads=4, vocab_size=32000,
    )  # fmt: skip
    model: torch.nn.Module = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    parameters = sum(p.numel() for p in model.parameters())
    if options.variant == "PEFT":
        import peft

        targets = r".*layers.*_proj"
        patched = peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=RANK * 2, target_modules=targets))
        factors: list[torch.Tensor] = [p for name, p in patched.named_parameters() if "lora_" in name]
        merge: Callable[[], object] = patched.merge_and_unload
    else:
        import graphpatch

        rules = f"patch layers[*].**:Linear with lora(rank={RANK}, alpha={RANK * 2})\nfreeze ** except @new"
        patch = graphpatch.apply(model, graphpatch.parse(rules))
        factors = list(patch.adapter_state_dict().values())
        merge = patch.bake if options.variant == "graphpatch" else patch.merge
    assert len(factors) == 14 * options.layers and factors[0].dtype == torch.float32
    with torch.no_grad():
        for factor in factors:
            factor.normal_(std=0.02)
    del factors
    CDLL(None).malloc_trim(0)
    before = reset_peak()
    start = perf_counter()
    merge()
    seconds = perf_counter() - start
    peak = resident("VmHWM") - before
    start = perf_counter()
    if options.variant == "kept":
        patch.unmerge()
    return {"seconds": seconds, "peak": peak, "unmerge": perf_counter() - start, "parameters": parameters}


def reset_peak() -> float:
    """Have the peak begin anew, at what is resident now (MiB)."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def resident(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))


if __name__ == "__main__":
    main()
