"""What LoRA costs in a training step, and in a single call, beside PEFT on the same model.

    python benchmarks/lora_step.py [--hidden 1024] [--layers 8] [--tokens 256] [--batch 2] [--repeats 15]

A Llama of `transformers`, all linears, rank 16, forward and backward without an optimizer; the variants take turns,
each the first in a third of them, and a figure is the median over the turns. "Overhead" is a step less the step of the
frozen base in the same turn (gradients of the activations alone), "saved" what autograd keeps for backward. The default
size is that of the figures in the project's goals and takes minutes; `--quick` is a quarter of it.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from operator import sub
from statistics import median
from time import perf_counter, process_time

import peft
import torch
from table import row
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import graphpatch

RANK = 16
RULES = f"""
patch layers[*].**:Linear with lora(rank={RANK}, alpha={RANK})
freeze **  except @new
"""


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {options.threads} thread{'s' * (options.threads > 1)}\n")
    for dtype in (torch.float32, torch.bfloat16):
        steps(options, dtype)
    calls()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.hidden, options.layers, options.tokens = 512, 4, 128
    return options


def steps(options: argparse.Namespace, dtype: torch.dtype) -> None:
    """Training steps of one dtype."""
    base = llama(options, dtype)
    x = torch.randn(options.batch, options.tokens, options.hidden, dtype=dtype, requires_grad=True)
    ours, theirs, frozen = copy.deepcopy(base), copy.deepcopy(base), base.requires_grad_(False)
    graphpatch.apply(ours, graphpatch.parse(RULES))
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=r".*layers.*_proj")
    theirs = peft.get_peft_model(theirs, config)
    models: dict[str, nn.Module] = {"frozen": frozen, "ours": ours, "peft": theirs}
    for model in models.values():
        model.train()
    seconds: dict[str, list[float]] = {name: [] for name in models}
    timed = dtype != torch.bfloat16 or torch.cpu._is_avx512_bf16_supported()
    for turn in range(options.repeats + 1 if timed else 0):
        order = list(models.items())
        for name, model in order[turn % 3 :] + order[: turn % 3]:  # whoever goes first finds other caches
            start = process_time()
            step(model, x)
            if turn:  # the first warms up
                seconds[name].append(process_time() - start)
    saved = {name: saved_mib(model, x) for name, model in models.items()}
    print(f"{dtype}: hidden {options.hidden}, {options.layers} layers, {options.batch} x {options.tokens} tokens")
    if timed:
        at = {name: median(values) for name, values in seconds.items()}
        # Of the difference within each turn: a machine that grows slower from turn to turn slows both.
        over = {name: median(map(sub, seconds[name], seconds["frozen"])) for name in ("ours", "peft")}
        goal = "at most 0.6" if dtype == torch.float32 else "at most 0.35"
        row("frozen base", at["frozen"])
        row("graphpatch", at["ours"])
        row("PEFT", at["peft"])
        row("  overhead, graphpatch", 100 * over["ours"] / at["frozen"], "%")
        row("  overhead, PEFT", 100 * over["peft"] / at["frozen"], "%")
        row("  graphpatch / PEFT", over["ours"] / over["peft"], "x", goal)
    else:
        print("this processor has no bfloat16 arithmetic: no time is measured")
    row("saved for backward, frozen base", saved["frozen"], "MiB")
    row("saved for backward, graphpatch", saved["ours"], "MiB")
    row("saved for backward, PEFT", saved["peft"], "MiB")
    row("  graphpatch / PEFT", saved["ours"] / saved["peft"], "x", "" if dtype == torch.float32 else "at most 0.65")
    print()


def llama(options: argparse.Namespace, dtype: torch.dtype) -> nn.Module:
    config = LlamaConfig(
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 11 // 4,
        num_hidden_layers=options.layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=1000,
    )
    model: nn.Module = LlamaForCausalLM(config)
    return model.to(dtype)


def step(model: nn.Module, x: torch.Tensor) -> None:
    model.zero_grad(set_to_none=True)
    x.grad = None
    model(inputs_embeds=x, use_cache=False).logits.float().pow(2).mean().backward()


def saved_mib(model: nn.Module, x: torch.Tensor) -> float:
    """What autograd holds between forward and backward, each storage once and without parameters."""
    held: dict[int, int] = {}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(inputs_embeds=x, use_cache=False).logits  # kept alive, so that no storage is used twice
        total = sum(held.values())
    del output
    return total / 2**20


def calls() -> None:
    """The fixed cost of one call: a linear of 64 x 64, one row, one thread."""
    torch.set_num_threads(1)
    x = torch.randn(1, 64)
    bare = nn.Linear(64, 64)
    ours = nn.Sequential(nn.Linear(64, 64))
    graphpatch.apply(ours, graphpatch.parse(f"patch ^0 with lora(rank={RANK})\nfreeze ** except @new"))
    theirs = nn.Sequential(nn.Linear(64, 64))
    peft.get_peft_model(theirs, peft.LoraConfig(r=RANK, target_modules=["0"]))  # type: ignore[arg-type]
    for name, context in (("no_grad", torch.no_grad), ("training", torch.enable_grad)):
        with context():
            a, b, c = (microseconds(lambda m=m: m(x)) for m in (bare, ours[0], theirs[0]))  # type: ignore[misc]
        row(f"one call, {name}: bare linear", a, "us")
        row(f"one call, {name}: graphpatch", b, "us")
        row(f"one call, {name}: PEFT", c, "us")
        row("  overhead, graphpatch / PEFT", (b - a) / (c - a), "x", "at most 0.35")


def microseconds(call: Callable[[], object], number: int = 2000) -> float:
    best = float("inf")
    for _ in range(7):
        start = perf_counter()
        for _ in range(number):
            call()
        best = min(best, perf_counter() - start)
    return best / number * 1e6


if __name__ == "__main__":
    main()
