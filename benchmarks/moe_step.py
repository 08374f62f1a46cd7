"""What LoRA on stacked experts costs in a training step, beside PEFT's `target_parameters` on the same model.

    python benchmarks/moe_step.py [--hidden 512] [--layers 4] [--experts 64] [--top 4] [--tokens 512] [--repeats 7]

A Qwen3-MoE of `transformers` in float32, rank 8 on `gate_up_proj` and `down_proj`, forward and backward without an
optimizer; the variants take turns, and each figure is the least over the turns. "Frozen" is the step of the unpatched
base (gradients of the activations alone), with the experts as Transformers computes them by default, and with its
plainest loop; "saved" what autograd keeps for backward, parameters apart. `--quick` is a sixth of it.
"""

from __future__ import annotations

import argparse
import copy
from time import process_time
from typing import Any

import peft
import torch
from lora_step import saved_mib, step
from table import row
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import graphpatch

RANK = 8
RULES = f"""
patch experts.gate_up_proj | experts.down_proj with lora(rank={RANK}, alpha={RANK})
freeze ** except @new
"""


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    base = experts(options)
    x = torch.randn(1, options.tokens, options.hidden, requires_grad=True)
    ours, theirs, frozen = copy.deepcopy(base), copy.deepcopy(base), base.requires_grad_(False)
    graphpatch.apply(ours, graphpatch.parse(RULES))
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=RANK,
        target_modules=[],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )
    models: dict[str, nn.Module] = {"frozen": frozen, "ours": ours, "peft": peft.get_peft_model(theirs, config)}
    eager: Any = copy.deepcopy(frozen)
    eager.set_experts_implementation("eager")
    models["eager"] = eager
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(options.repeats + 1):
        for name, model in models.items():
            model.train()
            start = process_time()
            step(model, x)
            if turn:  # the first warms up
                seconds[name].append(process_time() - start)
    saved = {name: saved_mib(model, x) for name, model in models.items()}
    at = {name: min(values) for name, values in seconds.items()}

    stack = sum(p.numel() for n, p in frozen.named_parameters() if ".experts." in n) * 4 / 2**20
    print(f"torch {torch.__version__}, {options.threads} thread{'s' * (options.threads > 1)}")
    print(
        f"{options.experts} experts ({stack:.0f} MiB), top {options.top}, hidden {options.hidden}, "
        f"{options.layers} layers, {options.tokens} tokens\n"
    )
    row("step, frozen base", at["frozen"])
    row("step, frozen base, experts in a plain loop", at["eager"])
    row("step, graphpatch", at["ours"])
    row("step, PEFT", at["peft"])
    row("  graphpatch / frozen", at["ours"] / at["frozen"], "x", "at most 1.6")
    row("  graphpatch / frozen, plain loop", at["ours"] / at["eager"], "x", "at most 1.6")
    row("  PEFT / frozen", at["peft"] / at["frozen"], "x")
    row("  graphpatch / PEFT", at["ours"] / at["peft"], "x")
    row("saved for backward, frozen base", saved["frozen"], "MiB")
    row("saved for backward, graphpatch", saved["ours"], "MiB")
    row("saved for backward, PEFT", saved["peft"], "MiB")
    row("  graphpatch / PEFT", saved["ours"] / saved["peft"], "x", "at most 0.3")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--top", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.hidden, options.layers, options.tokens, options.repeats = 256, 2, 256, 3
    return options


def experts(options: argparse.Namespace) -> nn.Module:
    config = Qwen3MoeConfig(  # type: ignore[call-arg]
        hidden_size=options.hidden,
        intermediate_size=options.hidden,
        moe_intermediate_size=options.hidden // 2,
        num_hidden_layers=options.layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=options.hidden // 8,
        num_experts=options.experts,
        num_experts_per_tok=options.top,
        vocab_size=1000,
    )
    model: nn.Module = Qwen3MoeForCausalLM(config)
    return model


if __name__ == "__main__":
    main()
