"""A model of the shape of DeepSeek-V3 with unfused experts: 75,000 modules, 45,000 linears, no memory (meta device)."""

from __future__ import annotations

import torch
from torch import nn

LAYERS, DENSE_LAYERS, EXPERTS, HIDDEN = 61, 3, 256, 7168


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_a_proj = nn.Linear(HIDDEN, 1536, bias=False)
        self.q_a_layernorm = nn.RMSNorm(1536)
        self.q_b_proj = nn.Linear(1536, 128 * 192, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(HIDDEN, 576, bias=False)
        self.kv_a_layernorm = nn.RMSNorm(512)
        self.kv_b_proj = nn.Linear(512, 128 * 256, bias=False)
        self.o_proj = nn.Linear(128 * 128, HIDDEN, bias=False)


class MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(HIDDEN, width, bias=False)
        self.up_proj = nn.Linear(HIDDEN, width, bias=False)
        self.down_proj = nn.Linear(width, HIDDEN, bias=False)
        self.act_fn = nn.SiLU()


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(EXPERTS, HIDDEN))


class MoE(nn.Module):
    def __init__(self, experts: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(MLP(2048) for _ in range(experts))
        self.gate = Router()
        self.shared_experts = MLP(2048)


class Block(nn.Module):
    def __init__(self, index: int, experts: int) -> None:
        super().__init__()
        self.self_attn = Attention()
        self.mlp = MLP(18432) if index < DENSE_LAYERS else MoE(experts)
        self.input_layernorm = nn.RMSNorm(HIDDEN)
        self.post_attention_layernorm = nn.RMSNorm(HIDDEN)


class Inner(nn.Module):
    def __init__(self, layers: int, experts: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(129280, HIDDEN)
        self.layers = nn.ModuleList(Block(i, experts) for i in range(layers))
        self.norm = nn.RMSNorm(HIDDEN)


class DeepSeek(nn.Module):
    def __init__(self, layers: int, experts: int) -> None:
        super().__init__()
        self.model = Inner(layers, experts)
        self.lm_head = nn.Linear(HIDDEN, 129280, bias=False)


def build(layers: int = LAYERS, experts: int = EXPERTS) -> nn.Module:
    with torch.device("meta"):
        return DeepSeek(layers, experts).bfloat16()
