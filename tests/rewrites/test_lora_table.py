"""LoRA against PEFT, as a table: each row is a model and the options of an adapter on it. Of the same factors, outputs,
gradients (of every factor and of the input) and merged weights are those of PEFT."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTModel,
)
from transformers.pytorch_utils import Conv1D

import graphpatch


class Kind(NamedTuple):
    make: Callable[[], nn.Module]
    input: Callable[[], Tensor]
    targets: tuple[str, ...] = ("0",)
    """The last names of what is adapted, as PEFT lists them."""
    rank: int = 4
    noise: float = 0.3
    """How far the factors are from where they started; a whole model magnifies."""


class Options(NamedTuple):
    ours: str
    peft: dict[str, Any]
    bf16: bool = False
    """The base in half precision, the factors in float32, which is the default of both."""


def single(make: Callable[[], nn.Module], *shape: int, rows: int = 0, rank: int = 4) -> Kind:
    input = (lambda: torch.randint(rows, shape)) if rows else (lambda: torch.randn(shape))
    return Kind(lambda: nn.Sequential(make()), input, ("0",), rank)


def llama() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 40}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))


def gpt2() -> nn.Module:
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=40, n_positions=16)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    return GPT2LMHeadModel(config)


def bert() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertModel(BertConfig(**sizes, **none, vocab_size=40))


def vit() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return ViTModel(ViTConfig(**sizes, image_size=16, patch_size=8))


def tokens() -> Tensor:
    return torch.randint(40, (2, 7))


KINDS = {
    "Linear": single(lambda: nn.Linear(7, 5), 2, 4, 7),
    "Linear, one row": single(lambda: nn.Linear(7, 5), 7),
    "Linear without bias": single(lambda: nn.Linear(7, 5, bias=False), 3, 7),
    "Linear, tall": single(lambda: nn.Linear(5, 9), 3, 5),
    "Linear, rank above its sizes": single(lambda: nn.Linear(7, 5), 3, 7, rank=9),
    "Conv1D of Transformers": single(lambda: Conv1D(5, 7), 2, 4, 7),
    "Embedding": single(lambda: nn.Embedding(11, 6), 2, 4, rows=11),
    "Embedding, padded": single(lambda: nn.Embedding(11, 6, padding_idx=3), 2, 9, rows=11),
    "Conv1d": single(lambda: nn.Conv1d(4, 6, 3), 2, 4, 9),
    "Conv2d": single(lambda: nn.Conv2d(4, 6, (3, 2), stride=2, padding=1), 2, 4, 8, 7),
    "Conv2d without bias": single(lambda: nn.Conv2d(4, 6, 3, padding="same", bias=False), 2, 4, 5, 5),
    "Conv2d of size 1": single(lambda: nn.Conv2d(6, 4, 1), 2, 6, 5, 5),
    "Conv3d": single(lambda: nn.Conv3d(2, 4, 2, stride=(1, 2, 1)), 2, 2, 4, 4, 4),
    "Llama": Kind(
        llama, tokens, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), noise=0.05
    ),
    "Llama with its embedding": Kind(llama, tokens, ("q_proj", "embed_tokens"), noise=0.05),
    "GPT-2": Kind(gpt2, tokens, ("c_attn", "c_proj", "c_fc"), noise=0.05),
    "BERT": Kind(bert, tokens, ("query", "key", "value", "dense", "word_embeddings"), noise=0.05),
    "ViT": Kind(vit, lambda: torch.randn(2, 3, 16, 16), ("q_proj", "v_proj", "fc1", "projection"), noise=0.05),
}

OPTIONS = {
    "alpha": Options("alpha=6", {"lora_alpha": 6}),
    "no alpha": Options("", {}),
    "rslora": Options("alpha=6, use_rslora=true", {"lora_alpha": 6, "use_rslora": True}),
    "dropout": Options("alpha=6, dropout=0.4", {"lora_alpha": 6, "lora_dropout": 0.4}),
    "bias": Options("alpha=6, bias=true", {"lora_alpha": 6, "lora_bias": True}),
    "bias, dropout": Options("bias=true, dropout=0.4", {"lora_bias": True, "lora_dropout": 0.4}),
    "dora": Options("alpha=6, dora=true", {"lora_alpha": 6, "use_dora": True}),
    "dora, rslora": Options("dora=true, use_rslora=true", {"use_dora": True, "use_rslora": True}),
    "dora, dropout": Options("dora=true, dropout=0.4", {"use_dora": True, "lora_dropout": 0.4}),
    "pissa": Options('alpha=6, init="pissa"', {"lora_alpha": 6, "init_lora_weights": "pissa"}),
    "pissa, fast": Options('init="pissa", iterations=16', {"init_lora_weights": "pissa_niter_16"}),
    "pissa, dropout": Options('init="pissa", dropout=0.4', {"init_lora_weights": "pissa", "lora_dropout": 0.4}),
    "pissa, dora": Options('init="pissa", dora=true', {"init_lora_weights": "pissa", "use_dora": True}),
    "olora": Options('alpha=6, init="olora"', {"lora_alpha": 6, "init_lora_weights": "olora"}),
    "olora, rslora": Options('init="olora", use_rslora=true', {"init_lora_weights": "olora", "use_rslora": True}),
    "olora, dora, dropout": Options(
        'init="olora", dora=true, dropout=0.4', {"init_lora_weights": "olora", "use_dora": True, "lora_dropout": 0.4}
    ),
    "bf16": Options("alpha=6", {"lora_alpha": 6}, bf16=True),
    "bf16, dora": Options("dora=true", {"use_dora": True}, bf16=True),
    "bf16, pissa": Options('init="pissa"', {"init_lora_weights": "pissa"}, bf16=True),
}

TABLE = {
    "Linear": [*OPTIONS],
    "Linear, one row": ["alpha", "pissa", "bias"],
    "Linear without bias": ["alpha", "dora", "dora, dropout", "pissa", "olora", "bf16"],
    "Linear, tall": ["alpha", "dora", "pissa", "olora"],
    "Linear, rank above its sizes": ["alpha", "dora", "bias"],
    "Conv1D of Transformers": [o for o in OPTIONS if "olora" not in o],
    "Embedding": ["alpha", "no alpha", "rslora", "dora", "dora, rslora", "bf16", "bf16, dora"],
    "Embedding, padded": ["alpha", "dora"],
    "Conv1d": ["alpha", "no alpha", "rslora", "dropout", "bias", "dora", "bf16"],
    "Conv2d": ["alpha", "rslora", "dropout", "bias", "dora", "dora, dropout", "bf16", "bf16, dora"],
    "Conv2d without bias": ["alpha", "dropout", "dora", "dora, dropout"],
    "Conv2d of size 1": ["alpha", "bias, dropout", "dora"],
    "Conv3d": ["alpha", "rslora", "dropout", "bias", "dora", "dora, dropout", "bf16"],
    "Llama": ["alpha", "rslora", "dropout", "dora", "dora, dropout", "pissa", "olora", "pissa, dora", "bf16"],
    "Llama with its embedding": ["alpha", "dora"],
    "GPT-2": ["alpha", "dropout", "bias", "dora", "pissa", "bf16"],
    "BERT": ["alpha", "dora", "bf16"],
    "ViT": ["alpha", "rslora", "dropout", "bias", "dora", "bf16"],
}
"""Which options are tried on which kind. What PEFT has not: a bias on an embedding, PiSSA and OLoRA but on linears, OLoRA
on Conv1D (it takes the weight for its transpose)."""

ROWS = [(kind, options) for kind, every in TABLE.items() for options in every]
FP32 = 1e-5
"""Of the largest element."""
BF16 = 0.02
"""Of the norm of all elements: PEFT computes the update in float32, we in the base's dtype, whose unit is 0.008."""


class Pair(NamedTuple):
    """One adapted module, of ours and of PEFT's."""

    name: str
    ours: nn.Module
    theirs: Any

    def tensors(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Our trained tensors and PEFT's; in PEFT's, a convolution's magnitude has more dimensions."""
        layer = self.theirs
        if layer.lora_embedding_A:
            yield self.ours.lora_A, layer.lora_embedding_A["default"]
            yield self.ours.lora_B, layer.lora_embedding_B["default"]
        else:
            yield self.ours.lora_A, layer.lora_A["default"].weight
            yield self.ours.lora_B, layer.lora_B["default"].weight
            if layer.lora_B["default"].bias is not None:
                yield self.ours.lora_B_bias, layer.lora_B["default"].bias
        if layer.lora_magnitude_vector:
            yield self.ours.lora_magnitude, layer.lora_magnitude_vector["default"].weight


def model_of(kind: Kind, options: Options) -> nn.Module:
    torch.manual_seed(0)
    return kind.make().to(torch.bfloat16 if options.bf16 else torch.float32)


def pair_of(kind: Kind, options: Options) -> tuple[nn.Module, graphpatch.Patch, nn.Module, list[Pair]]:
    """Both, with the same factors, which are off from where they started."""
    ours = model_of(kind, options)
    arguments = f"rank={kind.rank}" + (f", {options.ours}" if options.ours else "")
    selectors = " | ".join(f"**.{name}" if name != "0" else "^0" for name in kind.targets)
    patch = graphpatch.apply(ours, graphpatch.parse(f"patch {selectors} with lora({arguments})\nfreeze ** except @new"))
    given = {"lora_alpha": kind.rank, **options.peft}
    config = peft.LoraConfig(target_modules=list(kind.targets), r=kind.rank, **given)
    theirs = peft.get_peft_model(model_of(kind, options), config)
    pairs = [
        Pair(name, module, theirs.base_model.model.get_submodule(name))
        for name, module in ours.named_modules()
        if hasattr(module, "lora_A")
    ]
    torch.manual_seed(1)
    with torch.no_grad():
        for pair in pairs:
            for mine, yours in pair.tensors():
                mine.add_(kind.noise * torch.randn_like(mine))
                padding = getattr(pair.ours, "padding_idx", None)
                if padding is not None and mine is pair.ours.lora_A:
                    mine[:, padding] = 0  # as it starts, and without a gradient ever after
                yours.copy_(mine.view_as(yours))
    return ours, patch, theirs, pairs


def near(mine: Tensor, yours: Tensor, bf16: bool) -> None:
    assert mine.shape == yours.shape
    difference, like = (mine.double() - yours.double()).abs(), yours.double().abs()
    if bf16:
        assert difference.norm() <= BF16 * like.norm()
    else:
        assert difference.max() <= FP32 * max(1.0, like.max().item())


def output_of(model: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(3)  # of the dropout
    found = model(x)
    for name in ("logits", "pooler_output"):
        found = getattr(found, name, found)
    return found


@pytest.mark.parametrize(("kind", "options"), ROWS, ids=[f"{kind}: {options}" for kind, options in ROWS])
def test_the_same_as_peft(kind, options):
    kind, options = KINDS[kind], OPTIONS[options]
    ours, patch, theirs, pairs = pair_of(kind, options)
    assert pairs and len(pairs) == len(patch.changes)
    torch.manual_seed(2)
    x = kind.input()
    if x.is_floating_point():
        x = x.to(torch.bfloat16 if options.bf16 else torch.float32).requires_grad_()
    for train in (True, False):
        ours.train(train), theirs.train(train)
        y, z = output_of(ours, x), output_of(theirs, x)
        assert y.dtype == z.dtype
        near(y, z, options.bf16)
        weights = torch.randn_like(y)
        both = [both for pair in pairs for both in pair.tensors()]
        wanted = [x] if x.requires_grad else []
        mine = torch.autograd.grad((y * weights).sum(), [*wanted, *(t for t, _ in both)])
        yours = torch.autograd.grad((z * weights).sum(), [*wanted, *(t for _, t in both)])
        if options.bf16:  # some of a model's gradients are all but noise beside the others
            mine, yours = ([torch.cat([t.flatten().float() for t in some])] for some in (mine, yours))
        for one, other in zip(mine, yours, strict=True):
            near(one.view_as(other), other, options.bf16)
        with torch.no_grad():
            near(output_of(ours, x), output_of(theirs, x), options.bf16)
    patch.merge()
    theirs.merge_adapter()
    for pair in pairs:
        near(pair.ours.weight, pair.theirs.base_layer.weight, options.bf16)
        if getattr(pair.ours, "bias", None) is not None:
            near(pair.ours.bias, pair.theirs.base_layer.bias, options.bf16)


def test_the_table_is_a_table():
    assert len(ROWS) >= 100 and len(set(ROWS)) == len(ROWS)
    assert TABLE.keys() == KINDS.keys() and {options for _, options in ROWS} == OPTIONS.keys()
