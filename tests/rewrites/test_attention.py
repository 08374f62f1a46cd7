"""Changed attention, of every kind, against a plain reference in double precision."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

import graphpatch

from ..patch.common import patch, refused

WISHES = {
    "softcap.attention(0.5)": {"cap": 0.5},
    "attention.scale(0.7)": {"by": 0.7},
    "attention.window(3)": {"size": 3},
    "attention.causal(true)": {"causal": True},
    "attention.causal(true) then attention.scale(0.7) then attention.window(2) then softcap.attention(0.5)": {
        "causal": True, "by": 0.7, "size": 2, "cap": 0.5,
    },
}  # fmt: skip


def reference(
    q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, cap=None, by=None, size=None, causal=None
) -> Tensor:
    """(batch x heads x length x width); `hidden` is true where a key is not to be seen."""
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if by is None else by)
    scores = scores if cap is None else cap * torch.tanh(scores / cap)
    distance = torch.arange(q.shape[-2])[:, None] - torch.arange(k.shape[-2])
    gone = torch.zeros_like(distance, dtype=torch.bool)
    if causal:
        gone = gone | (distance < 0)
    if size is not None:
        gone = gone | (distance.abs() >= size)
    gone = gone if hidden is None else gone | hidden
    return torch.nan_to_num(scores.masked_fill(gone, -math.inf).softmax(-1)) @ v


def heads(x: Tensor, number: int) -> Tensor:
    return x.reshape(*x.shape[:-1], number, x.shape[-1] // number).transpose(-2, -3)


# ── nn.MultiheadAttention ──


@pytest.mark.parametrize("rule", WISHES)
@pytest.mark.parametrize("first", [True, False])
def test_torch_s_own(rule, first):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(8, 2, batch_first=first, dtype=torch.float64)
    patch(nn.ModuleDict({"a": module}), f"patch a with {rule}")
    x = torch.randn(3, 6, 8, dtype=torch.float64)
    padding = torch.zeros(3, 6, dtype=torch.bool)
    padding[1, 4:] = True
    for training in (True, False):
        module.train(training)
        found = []
        for way in ("ours", "reference"):
            module.zero_grad()
            leaf = x.clone().requires_grad_()
            if way == "ours":
                given = leaf if first else leaf.transpose(0, 1)
                y, weights = module(given, given, given, key_padding_mask=padding)
                y = y if first else y.transpose(0, 1)
                assert weights.shape == (3, 6, 6)
            else:
                q, k, v = (heads(z, 2) for z in F.linear(leaf, module.in_proj_weight, module.in_proj_bias).chunk(3, -1))
                y = reference(q, k, v, padding[:, None, None], **WISHES[rule]).transpose(1, 2).flatten(2)
                y = module.out_proj(y)
            y[~padding].square().sum().backward()
            found.append(
                (y[~padding], leaf.grad, module.in_proj_weight.grad.clone(), module.out_proj.weight.grad.clone())
            )
        assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(*found))
    with torch.no_grad():
        given = x if first else x.transpose(0, 1)
        again = module(given, given, given, key_padding_mask=padding, need_weights=False)[0]
    assert torch.allclose((again if first else again.transpose(0, 1))[~padding], found[0][0], atol=1e-12)


@pytest.mark.parametrize("options", [
    {"bias": False}, {"add_bias_kv": True}, {"add_zero_attn": True}, {"kdim": 5, "vdim": 7}, {"dropout": 0.0},
])  # fmt: skip
def test_torch_s_own_in_all_its_forms_is_what_it_was_where_the_cap_is_far(options):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(8, 2, dtype=torch.float64, **options)
    plain = copy.deepcopy(module)
    patch(nn.ModuleDict({"a": module}), "patch a with softcap.attention(1000000)")
    q, k, v = (torch.randn(5, 3, n, dtype=torch.float64) for n in (8, options.get("kdim", 8), options.get("vdim", 8)))
    mask = torch.ones(5, 5, dtype=torch.bool).triu(1)
    for given in ({}, {"attn_mask": mask}, {"attn_mask": mask.double() * -1e9}, {"attn_mask": mask.repeat(6, 1, 1)},
                  {"attn_mask": mask, "is_causal": True, "need_weights": False}, {"average_attn_weights": False}):  # fmt: skip
        if "is_causal" in given and (module.bias_k is not None or module.add_zero_attn):
            continue  # the fused kernel behind the hint hides the keys that the module adds
        for a, b in zip(module(q, k, v, **given), plain(q, k, v, **given)):
            assert (a is b is None) or torch.allclose(a, b, atol=1e-8)
    assert torch.allclose(module(q[:, 0], k[:, 0], v[:, 0])[0], plain(q[:, 0], k[:, 0], v[:, 0])[0], atol=1e-8)


def test_the_fast_path_does_not_pass_the_cap_by():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(2, 5, 8)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    plain = encoder(x)
    made = patch(encoder, "patch self_attn with softcap.attention(0.05) expect 2")
    slow = encoder.train()(x, src_key_padding_mask=padding)
    with torch.no_grad():
        fast = encoder.eval()(x, src_key_padding_mask=padding)
    assert torch.allclose(slow[~padding], fast[~padding], atol=1e-6)
    assert not torch.allclose(encoder(x), plain, atol=1e-3)
    made.revert()
    with torch.no_grad():
        assert torch.allclose(encoder(x), plain, atol=1e-6)


def test_with_lora_on_torch_s_own_in_either_order():
    x, outs = torch.randn(4, 2, 8), []
    for order in (1, -1):
        torch.manual_seed(0)
        model = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2)})
        for rule in ("patch a with softcap.attention(0.1)", 'patch a with lora(rank=2, init="gaussian")')[::order]:
            patch(model, rule)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora" in name:
                    p.copy_(torch.linspace(-1, 1, p.numel()).view_as(p))
        outs.append(model.a(x, x, x)[0])
        graphpatch.patches(model)[0 if order < 0 else 1].revert()
        assert not torch.allclose(model.a(x, x, x)[0], outs[-1], atol=1e-3)
    assert torch.allclose(*outs, atol=1e-6)


# ── written by hand ──


class ByHand(nn.Module):
    def __init__(self, **options: Any):
        super().__init__()
        self.qkv, self.out, self.options = nn.Linear(8, 16), nn.Linear(8, 8), options

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).split((8, 4, 4), -1)
        q, k, v = heads(q, 2), heads(k, 1), heads(v, 1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True, **self.options)
        return self.out(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("rule", WISHES)
@pytest.mark.parametrize("kind", ["none", "causal", "bool", "float"])
def test_a_module_that_calls_sdpa(rule, kind):
    torch.manual_seed(0)
    module = ByHand(**({"is_causal": True} if kind == "causal" else {})).double()
    model = nn.ModuleDict({"a": module})
    made = patch(model, f"patch a with {rule}")
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    hidden = torch.zeros(2, 1, 1, 6, dtype=torch.bool)
    hidden[1, ..., 4:] = True
    masks = {"bool": ~hidden, "float": hidden.double() * torch.finfo(torch.float64).min}
    wishes = {**WISHES[rule], **({"causal": True} if kind == "causal" else {})}
    q, k, v = module.qkv(x).split((8, 4, 4), -1)
    y = reference(heads(q, 2), heads(k, 1), heads(v, 1), hidden if kind in masks else None, **wishes)
    wanted = module.out(y.transpose(1, 2).flatten(2))
    real = ~(hidden.expand(2, 1, 6, 6)[:, 0, 0] & (kind in masks))  # a row that sees nothing has no value
    torch._dynamo.reset()  # one forward serves all modules of the suite
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    for one in (module, copy.deepcopy(model).a, pickle.loads(pickle.dumps(model)).a, compiled):
        assert torch.allclose(one(x, masks.get(kind))[real], wanted[real], atol=1e-10)
    made.revert()


def test_where_nobody_attends_is_told():
    model = nn.ModuleDict({"a": nn.Linear(4, 4)})
    patch(model, "patch a with softcap.attention(5.0)")
    with pytest.raises(graphpatch.Error, match="GP553"):
        model.a(torch.ones(1, 4))
    hand = nn.ModuleDict({"a": ByHand()})
    patch(hand, "patch a with attention.causal(false)")
    with pytest.raises(graphpatch.Error, match="GP554"):
        hand.a(torch.ones(1, 3, 8), torch.ones(3, 3, dtype=torch.bool))


# ── Transformers ──

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 40}
IDS = torch.tensor([[3, 4, 5, 6, 7, 8], [0, 0, 9, 10, 11, 12]])
RIGHT = torch.tensor([[3, 4, 5, 6, 7, 8], [9, 10, 11, 12, 0, 0]])


def llama(backend: str = "eager") -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, pad_token_id=0)).eval()
    model.set_attn_implementation(backend)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.4)
    return model


class Recorded:
    """What an attention module's projections gave, and what its output projection was given."""

    def __init__(self, module: Any, names: tuple[str, ...]):
        self.seen: dict[str, Tensor] = {}
        for name in names:
            child = module.get_submodule(name)
            child.register_forward_hook(lambda m, i, o, name=name: self.seen.update({name: o}))
        child.register_forward_pre_hook(lambda m, i: self.seen.update({"attended": i[0]}))


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("ids", [IDS, RIGHT], ids=["left", "right"])
@pytest.mark.parametrize("rule", [*list(WISHES)[:3], "attention.causal(false)"])
def test_llama(backend, ids, rule):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    model = llama(backend)
    made = patch(model, f"patch self_attn with {rule}")
    attention, mask = model.model.layers[0].self_attn, ids != 0
    recorded = Recorded(attention, ("q_proj", "k_proj", "v_proj", "o_proj"))
    model(ids, attention_mask=mask.long())
    q, k, v = (heads(recorded.seen[n], m) for n, m in (("q_proj", 4), ("k_proj", 2), ("v_proj", 2)))
    cos, sin = model.model.rotary_emb(q, torch.arange(6)[None])
    q, k = apply_rotary_pos_emb(q, k, cos, sin)
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    wishes = {"causal": True, **WISHES.get(rule, {"causal": False})}
    wanted = reference(q, k, v, ~mask[:, None, None], **wishes).transpose(1, 2).flatten(2)
    assert torch.allclose(recorded.seen["attended"][mask], wanted[mask], atol=1e-5)
    made.revert()
    assert torch.equal(
        model(ids, attention_mask=mask.long()).logits, llama(backend)(ids, attention_mask=mask.long()).logits
    )


@pytest.mark.filterwarnings("ignore:.*cannot cap")
@pytest.mark.parametrize("rule", WISHES)
def test_backends_agree_forward_and_backward_in_training_too(rule):
    found = []
    for backend in ("eager", "sdpa"):
        model = llama(backend).train()
        patch(model, f"patch self_attn with {rule}")
        out = model(RIGHT, attention_mask=(RIGHT != 0).long(), labels=RIGHT.masked_fill(RIGHT == 0, -100))
        out.loss.backward()
        found.append([out.logits[RIGHT != 0], *(p.grad for p in model.parameters())])
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*found))


def test_a_backend_set_later_keeps_the_cap_or_says_that_it_cannot():
    model = llama("eager")
    patch(model, "patch self_attn with softcap.attention(0.3)")
    wanted = model(IDS).logits
    model.set_attn_implementation("sdpa")
    assert torch.allclose(model(IDS).logits, wanted, atol=1e-4)
    model.set_attn_implementation("flex_attention")
    with torch.no_grad():
        assert torch.allclose(model(IDS).logits, wanted, atol=1e-3)
    for layer in model.model.layers:
        layer.self_attn.__dict__["config"]._attn_implementation = "flash_attention_2"
    with pytest.raises(graphpatch.Error, match="GP551"):
        model.model.layers[0].self_attn(torch.ones(1, 2, 16), (torch.ones(1, 2, 4), torch.ones(1, 2, 4)))


def test_a_backend_that_cannot_is_refused_before_anything_changes():
    model = llama()
    for layer in model.model.layers:
        layer.self_attn.config._attn_implementation = "flash_attention_2"
    for rule in ("softcap.attention(5.0)", "attention.window(3)"):
        text = refused("GP551", model, f"patch self_attn with {rule}")
        assert "flash_attention_2" in text and "LlamaAttention" in text
    patch(model, "patch self_attn with attention.scale(0.5)").revert()


def test_flex_attention_windows():
    wanted, model = llama(), llama("flex_attention")
    for one in (wanted, model):
        patch(one, "patch self_attn with attention.window(2) then attention.scale(0.4)")
    mask = (IDS != 0).long()
    with torch.no_grad():
        a, b = (one(IDS, attention_mask=mask).logits[IDS != 0] for one in (wanted, model))
    assert torch.allclose(a, b, atol=1e-4)


def test_bert_looks_both_ways():
    torch.manual_seed(0)
    model = BertModel(BertConfig(**SIZES), add_pooling_layer=False).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.4)
    patch(model, "use roles\npatch @attn with attention.window(2) then softcap.attention(0.5) expect 2")
    attention, mask = model.encoder.layer[0].attention, RIGHT != 0
    recorded = Recorded(attention, ("self.query", "self.key", "self.value", "output.dense"))
    model(RIGHT, attention_mask=mask.long())
    q, k, v = (heads(recorded.seen[f"self.{n}"], 4) for n in ("query", "key", "value"))
    wanted = reference(q, k, v, ~mask[:, None, None], size=2, cap=0.5).transpose(1, 2).flatten(2)
    assert torch.allclose(recorded.seen["attended"][mask], wanted[mask], atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*cannot cap")
@pytest.mark.parametrize(
    "kind", ["qwen2", "qwen3", "mistral", "gpt_neox", "phi3", "opt", "gpt2", "olmo2", "vit", "starcoder2"]
)
def test_families_take_a_cap_that_bites_and_give_it_back(kind):
    sizes = {**SIZES, "num_key_value_heads": 2, "n_embd": 16, "n_layer": 2, "n_head": 4, "ffn_dim": 24, "pad_token_id": 0,
             "word_embed_proj_dim": 16, "image_size": 8, "patch_size": 4, "max_position_embeddings": 32}  # fmt: skip
    config = AutoConfig.for_model(
        kind, **{k: v for k, v in sizes.items() if not (kind == "gpt2" and k == "hidden_size")}
    )
    torch.manual_seed(0)
    model = (AutoModel if kind == "vit" else AutoModelForCausalLM).from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.4)
    given = {"pixel_values": torch.randn(1, 3, 8, 8)} if kind == "vit" else {"input_ids": IDS}
    before = model(**given)[0]
    made = patch(model, "use roles\npatch @attn with softcap.attention(0.05) expect 2")
    assert (model(**given)[0] - before).abs().max() > 1e-3
    assert not made.probe(given)
    made.revert()
    assert torch.equal(model(**given)[0], before)


def test_a_model_that_caps_or_windows_itself_is_known():
    config = Gemma3TextConfig(
        **SIZES, num_key_value_heads=2, head_dim=4, sliding_window=4, layer_types=["sliding_attention"] * 2
    )
    model = AutoModelForCausalLM.from_config(config)
    refused("GP466", model, "patch self_attn with attention.window(none)")
    patch(model, "patch self_attn with attention.window(2)").revert()
    refused("GP204", model, "patch self_attn with softcap.attention(0)")
    refused("GP550", llama(), "patch mlp with softcap.attention(5.0)")


def test_copies_and_compiled_graphs():
    model = llama()
    patch(model, "patch self_attn with softcap.attention(0.3) then attention.window(3)")
    wanted = model(IDS).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(IDS).logits, wanted)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(IDS).logits, wanted, atol=1e-5)
