"""What parallel LoRA costs in a training step of a GPTModel, at tensor parallel sizes 1 and 2, beside one by hand.

    python benchmarks/megatron_step.py [--bridge PATH] [--layers 4] [--hidden 1024] [--repeats 9]

Rank 16 on the four linears of every layer, forward and backward without an optimizer, float32, a thread a rank. By hand
is the least that is right: two factors registered on the linear, the update added behind the base's own product. With
`--bridge`, a checkout of Megatron-Bridge (see benchmarks/megatron_plan.py), NVIDIA's LoRA takes part. The variants take
turns; each figure is the least over the turns on the first rank. "Overhead" is the step less that of the frozen base.
"""

from __future__ import annotations

import argparse
from time import perf_counter
from typing import Any

import torch
from megatron_bridge import lora_class
from megatron_model import LENGTH, VOCABULARY, gpt, on_ranks
from megatron_plan import LINEARS, RANK, RULES
from table import row
from torch import Tensor, nn
from torch.nn.functional import linear

import graphpatch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bridge", help="a checkout of Megatron-Bridge")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    for size in (1, 2):
        on_ranks(size, compare, options)


def compare(options: argparse.Namespace) -> None:
    size = torch.distributed.get_world_size()
    models = {"frozen base": gpt(options.layers, options.hidden).requires_grad_(False)}
    models["graphpatch"] = gpt(options.layers, options.hidden)
    graphpatch.apply(models["graphpatch"], graphpatch.parse(RULES))
    models["by hand"] = by_hand(gpt(options.layers, options.hidden))
    if options.bridge:
        theirs = lora_class(options.bridge)(target_modules=LINEARS, dim=RANK)
        models["Megatron-Bridge"] = theirs(gpt(options.layers, options.hidden))
    least = dict.fromkeys(models, float("inf"))
    for turn in range(options.repeats + 1):
        for name, model in models.items():
            torch.distributed.barrier()
            start = perf_counter()
            step(model)
            if turn:  # the first warms up
                least[name] = min(least[name], perf_counter() - start)
    if torch.distributed.get_rank():
        return
    frozen = least.pop("frozen base")
    row(f"TP={size}: frozen base", frozen)
    for name, seconds in least.items():
        row(f"TP={size}: overhead, {name}", 100 * (seconds / frozen - 1), "%")
    ours = least.pop("graphpatch") - frozen
    for name, seconds in least.items():
        row(f"  graphpatch / {name}", ours / (seconds - frozen), "x", "at most 1.1" if name == "by hand" else "")


def step(model: nn.Module) -> None:
    ids = torch.arange(2 * LENGTH).view(2, LENGTH) % VOCABULARY
    model.zero_grad(set_to_none=True)
    places = torch.arange(LENGTH).expand(2, LENGTH)
    # Gradients reach the first layer as they do through a trained embedding.
    loss = model(ids, places, None, labels=ids, decoder_input=embedded(ids, model)).mean()
    loss.backward()


def embedded(ids: Tensor, model: Any) -> Tensor:
    x: Tensor = model.embedding(input_ids=ids, position_ids=None)
    return x.detach().requires_grad_()


def by_hand(model: nn.Module) -> nn.Module:
    model.requires_grad_(False)
    kinds = {"ColumnParallelLinear": Column, "RowParallelLinear": Row}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in LINEARS:
            out, into = module.weight.shape
            module.a = nn.Parameter(torch.randn(RANK, into) / into**0.5)
            module.b = nn.Parameter(torch.zeros(out, RANK))
            module.__class__ = type(type(module).__name__, (kinds[type(module).__name__], type(module)), {})
    return model


class Column(nn.Module):
    a: Tensor
    b: Tensor

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region

        output, bias = super().forward(x, *args, **kwargs)
        return output + linear(copy_to_tensor_model_parallel_region(linear(x, self.a)), self.b), bias


class Row(nn.Module):
    a: Tensor
    b: Tensor

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region

        output, bias = super().forward(x, *args, **kwargs)
        return output + linear(reduce_from_tensor_model_parallel_region(linear(x, self.a)), self.b), bias


if __name__ == "__main__":
    main()
