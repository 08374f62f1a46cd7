"""What capped attention costs, forward and backward, by kind of attention and backend, beside Transformers' Gemma 2.

    python benchmarks/softcap.py [--lengths 512 2048] [--repeats 5] [--quick]

One attention layer of 8 heads of 64, causal, float32, cap 50. The peer is `Gemma2Attention` under `eager`; ours are a
`LlamaAttention` under `eager` and `sdpa`, an `nn.MultiheadAttention` and a module that calls
`F.scaled_dot_product_attention`, all with the same projections' sizes, changed by one rule. The variants take turns;
each figure is the least over the turns. Goal: at most 1.0 of the peer.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from time import process_time
from typing import Any

import torch
from table import row
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Gemma2Config, LlamaConfig
from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention
from transformers.models.llama.modeling_llama import LlamaAttention

import graphpatch

HEADS, WIDTH, CAP = 8, 64, 50.0
SIZES: dict[str, Any] = {
    "hidden_size": HEADS * WIDTH, "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "head_dim": WIDTH,
    "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 8,
}  # fmt: skip


class ByHand(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(HEADS * WIDTH, 3 * HEADS * WIDTH), nn.Linear(HEADS * WIDTH, HEADS * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


def variants(length: int) -> dict[str, Callable[[Tensor], Tensor]]:
    cos, sin = torch.randn(1, length, WIDTH), torch.randn(1, length, WIDTH)
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    mask = torch.zeros(1, 1, length, length).masked_fill(hidden, torch.finfo(torch.float32).min)

    def peer(backend: str) -> Any:
        config: Any = Gemma2Config(**{**SIZES, "attn_logit_softcapping": CAP, "attn_implementation": backend})
        return Gemma2Attention(config, 0)

    def llama(backend: str) -> Any:
        config: Any = LlamaConfig(**{**SIZES, "attn_implementation": backend})
        return LlamaAttention(config, 0)

    gemma, eager, sdpa = peer("eager"), llama("eager"), llama("sdpa")
    torch_s, by_hand = nn.MultiheadAttention(HEADS * WIDTH, HEADS, batch_first=True), ByHand()
    ours = nn.ModuleDict({"eager": eager, "sdpa": sdpa, "torch": torch_s, "hand": by_hand})
    graphpatch.apply(ours, graphpatch.parse(f"patch ^{{eager,sdpa,torch,hand}} with softcap.attention({CAP})"))
    return {
        "Gemma2Attention, eager": lambda x: gemma(x, (cos, sin), mask)[0],
        "LlamaAttention, eager": lambda x: eager(x, (cos, sin), mask)[0],
        "LlamaAttention, sdpa": lambda x: sdpa(x, (cos, sin), None)[0],
        "nn.MultiheadAttention": lambda x: torch_s(x, x, x, attn_mask=hidden, need_weights=False)[0],
        "F.scaled_dot_product_attention": by_hand,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    for length in [256] if options.quick else options.lengths:
        forwards = variants(length)
        least = dict.fromkeys(forwards, float("inf"))
        for turn in range(options.repeats + 1):
            for name, forward in forwards.items():
                x = torch.randn(1, length, HEADS * WIDTH, requires_grad=True)
                start = process_time()
                forward(x).sum().backward()
                if turn:  # the first warms up
                    least[name] = min(least[name], process_time() - start)
        (peer, base), *ours = least.items()
        row(f"{length} positions: {peer}", base)
        for name, seconds in ours:
            row(f"{length} positions: {name}, capped / the peer", seconds / base, "x", "at most 1.0")


if __name__ == "__main__":
    main()
