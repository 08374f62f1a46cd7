"""Small models of real families, built without any download, and what PEFT does with them."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import graphpatch

IDS = torch.arange(12).view(2, 6)


def llama(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
    config = transformers.LlamaConfig(num_attention_heads=2, num_key_value_heads=1, **(sizes | options))
    return transformers.LlamaForCausalLM(config).eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=16)
    return transformers.GPT2LMHeadModel(config).eval()


def bert(labels: int = 3) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, num_labels=labels,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config).eval()


def t5() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    return transformers.T5ForConditionalGeneration(config).eval()


def logits(model: nn.Module) -> torch.Tensor:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if isinstance(base, ConvNet):
        return model(torch.arange(2 * 4 * 8 * 8).view(2, 4, 8, 8).sin())
    if isinstance(base, Attending):
        return model(torch.arange(2 * 5 * 16).view(2, 5, 16).sin())
    inputs = {"input_ids": IDS}
    if base.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = IDS
    return model(**inputs).logits


class ConvNet(nn.Module):
    """Convolutions of each dimension, one with groups, and a norm that has running statistics."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(4, 8, 3, padding=1, stride=2)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2, padding=1)
        self.row = nn.Conv1d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.grouped(self.norm(self.first(x)).relu())
        return self.head(self.row(x.flatten(2)).mean(-1))


class Attending(nn.Module):
    """`nn.MultiheadAttention`, which has its weights read."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attn, self.head = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 3)
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.attn(x, x, x)[0])


def randomise(tensors: Any, seed: int = 1) -> None:
    """Values that no initialisation gives, so that nothing equals by chance."""
    made = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in tensors:
            tensor.copy_(torch.randn(tensor.shape, generator=made) * 0.2)


def theirs(model: nn.Module, folder: Path, **fields: Any) -> torch.Tensor:
    """An adapter that PEFT made on a copy of the model, saved by PEFT; returns its logits."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(copy.deepcopy(model), LoraConfig(**fields)).eval()
        randomise(p for name, p in wrapped.named_parameters() if p.requires_grad)
        wrapped.save_pretrained(str(folder))
    return logits(wrapped).detach()


def by_peft(model: nn.Module, folder: Path) -> torch.Tensor:
    """The logits of a copy of the model under the adapter in the folder, which PEFT loads; it must miss nothing."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = PeftModel.from_pretrained(copy.deepcopy(model), str(folder)).eval()
    # That patterns match no module is told of those that are meant for parameters too.
    told = [str(w.message) for w in caught if "keys" in str(w.message) and "_pattern keys" not in str(w.message)]
    assert not told, told
    return logits(loaded).detach()


def trained(model: nn.Module, rules: str, **options: Any) -> graphpatch.Patch:
    """Patched, with random values for all that trains."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch = graphpatch.apply(model, graphpatch.parse(rules), **options)
    randomise(patch.trainable_parameters())
    return patch


MOE = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}


def mixtral() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**MOE, intermediate_size=24, num_local_experts=4, num_experts_per_tok=2)
    return transformers.MixtralForCausalLM(config).eval()


def qwen3_moe() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        **MOE, intermediate_size=24, moe_intermediate_size=12, num_experts=4, num_experts_per_tok=2, mlp_only_layers=[0]
    )
    return transformers.Qwen3MoeForCausalLM(config).eval()


def deepseek() -> nn.Module:
    """A dense layer, and one of routed and shared experts."""
    torch.manual_seed(0)
    options = MOE | {"num_key_value_heads": 2}
    config = transformers.DeepseekV3Config(
        **options, intermediate_size=24, moe_intermediate_size=12, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1, first_k_dense_replace=1, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4,
        v_head_dim=8, n_shared_experts=1,
    )  # fmt: skip
    return transformers.DeepseekV3ForCausalLM(config).eval()


def llama4(intermediate: int = 24) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.Llama4TextConfig(
        **MOE, intermediate_size=intermediate, intermediate_size_mlp=24, num_local_experts=4, head_dim=8, pad_token_id=0
    )
    model = transformers.Llama4ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name:
                parameter.normal_(std=0.2)
    return model


def gpt_oss() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        **MOE, intermediate_size=24, num_local_experts=4, num_experts_per_tok=2, head_dim=8, sliding_window=8
    )
    return transformers.GptOssForCausalLM(config).eval()
