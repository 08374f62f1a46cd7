"""What the tests of this room share: tiny models, data, and a Trainer over them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainingArguments,
)

import graphpatch
from graphpatch.transformers import AdapterCheckpoint

logging.getLogger("transformers").setLevel(logging.ERROR)

LORA = "patch :Linear with lora(rank=4, alpha=8, dropout=0.1)  except ^lm_head\nfreeze ** except @new"
MOE = LORA + "\npatch experts.{gate_up_proj,down_proj} with lora(rank=2)"
BERT = "patch {query,value} with lora(rank=4, dropout=0.1)\nfreeze ** except @new\ntrain ^classifier | ^bert.pooler"
GPT2 = "patch {c_attn,c_proj} with lora(rank=4, dropout=0.1)\nfreeze ** except @new"
ROOT = Path(__file__).parents[2]
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


def llama(**config: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SMALL, "vocab_size": 64, "num_key_value_heads": 2, **config}))


def mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(**SMALL, vocab_size=64, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)
    )


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=32))


def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**SMALL, vocab_size=64, num_labels=3))


KINDS = {"llama": (llama, LORA), "mixtral": (mixtral, MOE), "gpt2": (gpt2, GPT2), "bert": (bert, BERT)}


def data(model: nn.Module, n: int = 32) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 64, (n, 8), generator=generator)
    if isinstance(model, BertForSequenceClassification):
        return [{"input_ids": row, "labels": row[0] % 3} for row in ids]
    return [{"input_ids": row, "labels": row} for row in ids]


def patched(kind: str = "llama", text: str | None = None, **config: Any) -> tuple[Any, graphpatch.Patch]:
    make, rules = KINDS[kind]
    model = make(**config)
    return model, graphpatch.apply(model, graphpatch.parse(text or rules))


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    return TrainingArguments(
        **{
            "output_dir": str(folder),
            "max_steps": 6,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_steps": 2,
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            **options,
        }
    )


def trainer(model: nn.Module, folder: Path, *callbacks: Any, **options: Any) -> Trainer:
    made = Trainer(
        model,
        arguments(folder, **options),
        train_dataset=data(model),
        eval_dataset=data(model, 8),
        callbacks=list(callbacks),
    )
    return made


def trained(kind: str, folder: Path, **options: Any) -> tuple[Any, graphpatch.Patch, Trainer]:
    """A run over a fresh model, to its end."""
    model, patch = patched(kind)
    run = trainer(model, folder, AdapterCheckpoint(patch), **options)
    run.train()
    return model, patch, run


def losses(run: Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]
