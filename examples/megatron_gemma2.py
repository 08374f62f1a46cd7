"""Gemma 2 from a stock megatron-core GPTModel, by rules alone, with the weights of a Hugging Face checkpoint.

    python examples/megatron_gemma2.py [DIRECTORY of a Gemma 2]

Without a directory a small Gemma 2 with random weights is made first. Prints what the rules do, loads the weights
through their `map` statements, and compares the logits with those of Transformers.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

import graphpatch
import graphpatch.megatron.cpu


def small(folder: Path) -> Path:
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=24, sliding_window=7, query_pre_attn_scalar=40,
        attn_logit_softcapping=2.0, final_logit_softcapping=3.0,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    return folder


def gpt(theirs: Any) -> nn.Module:
    """A stock GPTModel of the same sizes."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=theirs.num_hidden_layers,
        hidden_size=theirs.hidden_size,
        num_attention_heads=theirs.num_attention_heads,
        num_query_groups=theirs.num_key_value_heads,
        kv_channels=theirs.head_dim,
        ffn_hidden_size=theirs.intermediate_size,
        layernorm_epsilon=theirs.rms_norm_eps,
        normalization="RMSNorm",
        gated_linear_unit=True,
        add_bias_linear=False,
        use_cpu_initialization=not torch.cuda.is_available(),
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
    )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        theirs.vocab_size,
        theirs.max_position_embeddings,
        share_embeddings_and_output_weights=True,
        position_embedding_type="rope",
    )


def start(folder: str) -> None:
    """megatron-core on this one process."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if not torch.cuda.is_available():
        graphpatch.megatron.cpu.enable()
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(0)


def main() -> None:
    with tempfile.TemporaryDirectory() as made:
        folder = Path(sys.argv[1]) if len(sys.argv) > 1 else small(Path(made) / "gemma2")
        theirs = AutoConfig.from_pretrained(folder)
        ids = torch.randint(theirs.vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            wanted = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()(ids).logits

        start(made)
        model = gpt(theirs).eval()
        names = "attn_logit_softcapping final_logit_softcapping query_pre_attn_scalar sliding_window"
        rules = graphpatch.load("gemma2", **{name: getattr(theirs, name) for name in names.split()})
        print(rules.plan(model))
        patch = graphpatch.apply(model, rules)
        graphpatch.load_weights(patch, folder)
        with torch.no_grad():
            ours = model(ids, torch.arange(24).expand(2, 24), None)
        print(f"\nthe largest logit {wanted.abs().max():.2f}, the largest difference {(ours - wanted).abs().max():.1e}")


if __name__ == "__main__":
    main()
