"""Small models of the usual shapes, for tests that need no real one."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import nn


class Attention(nn.Module):
    def __init__(self, hidden: int, value: bool = True):
        super().__init__()
        self.q_proj = nn.Linear(hidden, hidden, bias=False)
        self.k_proj = nn.Linear(hidden, hidden, bias=False)
        if value:
            self.v_proj = nn.Linear(hidden, hidden, bias=False)
        self.o_proj = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.q_proj(x) @ self.k_proj(x).transpose(-1, -2) / x.shape[-1] ** 0.5
        value = self.v_proj(x) if hasattr(self, "v_proj") else self.k_proj(x)
        return self.o_proj(scores.softmax(-1) @ value)


class MLP(nn.Module):
    def __init__(self, hidden: int):
        super().__init__()
        self.up_proj = nn.Linear(hidden, 2 * hidden)
        self.down_proj = nn.Linear(2 * hidden, hidden)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.dropout(torch.relu(self.up_proj(x))))


class RMSNorm(nn.Module):
    def __init__(self, hidden: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


class Block(nn.Module):
    def __init__(self, hidden: int, value: bool = True):
        super().__init__()
        self.self_attn = Attention(hidden, value)
        self.mlp = MLP(hidden)
        self.input_layernorm = RMSNorm(hidden)
        self.post_attention_layernorm = RMSNorm(hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Body(nn.Module):
    def __init__(self, layers: int, hidden: int, vocabulary: int, value: Callable[[int], bool]):
        super().__init__()
        self.embed_tokens = nn.Embedding(vocabulary, hidden)
        self.layers = nn.ModuleList(Block(hidden, value(i)) for i in range(layers))
        self.norm = RMSNorm(hidden)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class LM(nn.Module):
    """A decoder in the shape of Llama: `model.layers.N.self_attn.q_proj`, `lm_head`.

    `tied` shares the head with the embedding; `value(i)` says which layers have a `v_proj`.
    """

    def __init__(
        self,
        layers: int = 4,
        hidden: int = 16,
        vocabulary: int = 32,
        tied: bool = False,
        value: Callable[[int], bool] = lambda i: True,
    ):
        super().__init__()
        self.config = SimpleConfig(hidden_size=hidden, num_hidden_layers=layers, model_type="toy")
        self.model = Body(layers, hidden, vocabulary, value)
        self.lm_head = nn.Linear(hidden, vocabulary, bias=False)
        if tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.model(ids))


class SimpleConfig(SimpleNamespace):
    def to_dict(self) -> dict:
        return dict(vars(self))


def lm(*args: object, **kwargs: object) -> LM:
    """A deterministic `LM` on the CPU."""
    torch.manual_seed(0)
    return LM(*args, **kwargs)  # type: ignore[arg-type]


def meta_lm(*args: object, **kwargs: object) -> LM:
    with torch.device("meta"):
        return LM(*args, **kwargs)  # type: ignore[arg-type]
