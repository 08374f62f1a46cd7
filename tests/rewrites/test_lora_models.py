"""LoRA on real models whose layers are no linears: against PEFT on the same model with the same factors."""

from __future__ import annotations

import copy

import peft
import torch
import transformers
from torch import nn

import graphpatch


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=50, n_positions=16)
    return transformers.GPT2LMHeadModel(config).eval()


def tokens(vocabulary: int = 50) -> torch.Tensor:
    torch.manual_seed(2)
    return torch.randint(vocabulary, (2, 9))


def logits(model: nn.Module, batch) -> torch.Tensor:
    out = model(batch)
    return out if isinstance(out, torch.Tensor) else out[0]


def compare(make, rules: str, targets: list[str], batch, count: int, **options) -> None:
    """The same outputs, and the same gradients of all factors; then back to the bytes of before."""
    model = make()
    before = copy.deepcopy(model.state_dict())
    patch = graphpatch.apply(model, graphpatch.parse(rules + "\nfreeze ** except @new"))
    assert len(patch.changes) == count and torch.equal(logits(model, batch), logits(make(), batch))
    config = peft.LoraConfig(target_modules=targets, r=4, lora_alpha=8, **options)
    theirs = peft.get_peft_model(make(), config).eval()
    torch.manual_seed(1)
    pairs = []
    for path in (change.path for change in patch.changes):
        layer, mine = theirs.base_model.model.get_submodule(path), model.get_submodule(path)
        a, b = (
            (layer.lora_embedding_A["default"], layer.lora_embedding_B["default"])
            if layer.lora_embedding_A
            else (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
        )
        pairs += [(mine.lora_A, a), (mine.lora_B, b)]
    for mine, yours in pairs:
        nn.init.normal_(mine, std=0.1)
        yours.data.copy_(mine.detach())
    y, z = logits(model, batch), logits(theirs, batch)
    assert not torch.equal(y, logits(make(), batch))
    torch.testing.assert_close(y, z, atol=1e-5, rtol=1e-5)
    ours = torch.autograd.grad(y.pow(2).sum(), [mine for mine, _ in pairs])
    for mine, yours in zip(ours, torch.autograd.grad(z.pow(2).sum(), [yours for _, yours in pairs]), strict=True):
        assert (mine - yours).abs().max() <= 1e-5 * max(1.0, yours.abs().max().item())
    patch.revert()
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)


def test_gpt2():
    rules = "patch h[*].**.{c_attn,c_proj,c_fc} with lora(rank=4, alpha=8) expect 4 per h[*]"
    compare(gpt2, rules, ["c_attn", "c_proj", "c_fc"], tokens(), 8, fan_in_fan_out=True)


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        num_hidden_layers=2, hidden_size=32, num_attention_heads=4, intermediate_size=48, vocab_size=50
    )
    return transformers.BertModel(config).eval()


def test_bert_with_its_embeddings():
    rules = """
        patch word_embeddings | token_type_embeddings with lora(rank=4, alpha=8) expect 2
        patch layer[*].**.{query,value} with lora(rank=4, alpha=8) expect 2 per layer[*]
    """
    targets = ["word_embeddings", "token_type_embeddings", "query", "value"]
    compare(bert, rules, targets, tokens(), 6)


def resnet() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        num_channels=3, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic"
    )
    return transformers.ResNetModel(config).eval()


def test_every_convolution_of_a_resnet():
    torch.manual_seed(2)
    batch = torch.randn(2, 3, 32, 32)
    compare(resnet, "patch :Conv2d with lora(rank=4, alpha=8) expect 8", ["convolution"], batch, 8)


def test_the_packaged_rules_train_gpt2():
    model = gpt2().train()
    patch = graphpatch.apply(model, "lora", rank=4)
    assert len(patch.changes) == 4
    optimizer, batch = torch.optim.AdamW(patch.trainable_parameters(), lr=0.02), tokens()
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert all(p.grad is None for n, p in model.named_parameters() if "lora_" not in n)
