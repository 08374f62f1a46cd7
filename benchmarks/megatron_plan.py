"""Planning and patching a GPTModel of 126 layers on the meta device, beside NVIDIA's own walk and LoRA.

    python benchmarks/megatron_plan.py --bridge PATH [--layers 126]

PATH is a checkout of Megatron-Bridge:

    git clone --depth 1 --branch v0.4.1 https://github.com/NVIDIA-NeMo/Megatron-Bridge

(the newest that runs on megatron-core 0.16.1). Rank 16 on the four linears of every layer, the rest frozen. CPU
seconds, the least of several runs, each on a model of its own. Goal: at least 10 times as fast.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from time import process_time

import torch
from megatron_bridge import lora_class
from megatron_model import gpt, on_ranks
from table import row
from torch import nn

import graphpatch

LINEARS = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
RANK = 16
RULES = f"patch {{{','.join(LINEARS)}}} with lora(rank={RANK})\nfreeze ** except @new"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bridge", required=True, help="a checkout of Megatron-Bridge")
    parser.add_argument("--layers", type=int, default=126)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    on_ranks(1, compare, options.bridge, options.layers, options.repeats)


def compare(bridge: str, layers: int, repeats: int) -> None:
    theirs = lora_class(bridge)
    rules = graphpatch.parse(RULES)

    def by_bridge(model: nn.Module) -> None:
        # On a device of its own their adapters would be made and filled with numbers.
        with torch.device("meta"):
            theirs(target_modules=LINEARS, dim=RANK)(model)

    seconds, trained = least(lambda model: graphpatch.apply(model, rules), layers, repeats)
    planned, _ = least(rules.plan, layers, repeats)
    peers, same = least(by_bridge, layers, repeats)
    assert trained == same, f"{trained} parameters train, and {same} of theirs"
    print(f"GPTModel, {layers} layers on meta, {4 * layers} targets, {trained} parameters train")
    row("graphpatch: plan", planned)
    row("graphpatch: plan and apply", seconds)
    row("Megatron-Bridge: LoRA()(model)", peers)
    row("  Megatron-Bridge / graphpatch", peers / seconds, "x", "at least 10")


def least(patch: Callable[[nn.Module], object], layers: int, repeats: int) -> tuple[float, int]:
    """Seconds of the fastest run, and how many parameters train after it."""
    best, trained = float("inf"), 0
    for _ in range(repeats):
        with torch.device("meta"):
            model = gpt(layers, 1024)
        gc.collect()
        start = process_time()
        patch(model)
        best = min(best, process_time() - start)
        trained = sum(p.requires_grad for p in model.parameters())
    return best, trained


if __name__ == "__main__":
    main()
