"""LoRA of parts of a fused linear: against separate linears with the same factors, and against what Transformers'
attention does with them."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import graphpatch

from ..patch.common import randomise, refused, state

FREEZE = "\nfreeze ** except @new"


class Fused(nn.Module):
    def __init__(self, made: nn.Module) -> None:
        super().__init__()
        self.qkv = made

    def forward(self, x: Tensor) -> Tensor:
        return self.qkv(x)


def rows(layout: list[tuple[str, int]], groups: int, part: str) -> list[int]:
    """The rows of a part, counted one by one."""
    found, at = [], 0
    for _ in range(groups):
        for name, size in layout:
            found += range(at, at + size) if name == part else ()
            at += size
    return found


LAYOUTS = {
    "one after the other": ([("q", 4), ("k", 4), ("v", 4)], 1),
    "fewer keys": ([("q", 8), ("k", 2), ("v", 2)], 1),
    "head by head": ([("q", 2), ("k", 1), ("v", 1)], 3),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("cls", [nn.Linear, Conv1D])
@pytest.mark.parametrize("parts", [["q", "v"], ["v", "q"], ["k"], ["q", "k", "v"]])
@pytest.mark.parametrize("name", LAYOUTS)
def test_as_separate_linears_would(name, parts, cls, training):
    """loralib's MergedLinear: zero where nothing was asked for, and elsewhere the part's own product."""
    layout, groups = LAYOUTS[name]
    torch.manual_seed(0)
    model = Fused(cls(12, 6) if cls is Conv1D else cls(6, 12)).train(training)
    plain = copy.deepcopy(model)
    said = ", ".join(f'["{n}", {size}]' for n, size in layout)
    text = f"lora(rank=2, alpha=3, parts={parts}, layout=[{said}], groups={groups})".replace("'", '"')
    patch = graphpatch.apply(model, graphpatch.parse(f"patch qkv with {text}{FREEZE}"))
    x = torch.randn(5, 6, requires_grad=True)
    assert torch.equal(model(x), plain(x))
    randomise(patch)
    a, b = model.qkv.lora_A, model.qkv.lora_B
    chosen = [n for n, _ in layout if n in parts]
    out = sum(size for _, size in layout) * groups
    assert a.shape == (2 * len(parts), 6) and b.shape == (sum(len(rows(layout, groups, p)) for p in parts), 2)
    wanted, at = plain(x).clone(), 0
    for place, part in enumerate(chosen):
        own = rows(layout, groups, part)
        lower, upper = a[2 * place : 2 * place + 2], b[at : at + len(own)]
        wanted[:, own] = wanted[:, own] + 1.5 * x @ lower.t() @ upper.t()
        at += len(own)
    torch.testing.assert_close(model(x), wanted)
    weights = torch.randn(5, out)
    grads = [torch.autograd.grad((y * weights).sum(), [x, a, b], retain_graph=True) for y in (model(x), wanted)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)
    with torch.no_grad():
        torch.testing.assert_close(model(x), wanted)
    patch.merge()
    torch.testing.assert_close(model(x), wanted)
    patch.unmerge()
    patch.revert()
    assert torch.equal(model(x), plain(x))


def test_each_part_starts_as_a_linear_of_its_own():
    model = Fused(nn.Linear(64, 48))
    rule = 'patch qkv with lora(rank=16, init="gaussian", parts=["q", "v"], layout=[["q", 16], ["k", 16], ["v", 16]])'
    graphpatch.apply(model, graphpatch.parse(rule + FREEZE))
    assert abs(model.qkv.lora_A.std().item() * 16 - 1) < 0.1 and not model.qkv.lora_B.any()


def test_with_dropout_named_saved_and_loaded(tmp_path):
    rule = 'patch qkv with lora(rank=2, dropout=0.5, parts=["q"], layout=[["q", 4], ["k", 4], ["v", 4]])'
    model = Fused(nn.Linear(6, 12))
    patch = graphpatch.apply(model, graphpatch.parse(rule + FREEZE), adapter="mine")
    randomise(patch)
    x = torch.randn(40, 6, requires_grad=True)
    one, other = model(x), model(x)
    assert not torch.equal(one[:, :4], other[:, :4]) and torch.equal(one[:, 4:], other[:, 4:])
    assert set(patch.adapter_state_dict()) == {"qkv.lora_A_mine", "qkv.lora_B_mine"}
    graphpatch.save_adapter(patch, tmp_path)
    again = Fused(nn.Linear(6, 12))
    again.load_state_dict({k: v for k, v in model.state_dict().items() if "lora" not in k})
    graphpatch.load_adapter(again, tmp_path)
    assert torch.equal(again.eval()(x), model.eval()(x))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


# ── what Transformers' own models make of the rows ──

SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 32,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
GPT: dict[str, Any] = {"n_embd": 16, "n_layer": 1, "n_head": 4, "vocab_size": 32, "n_positions": 32}
FALCON = SMALL | {"alibi": False}
MODELS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "GPT2": ("GPT2", "LMHeadModel", GPT, "c_attn"),
    "BigCode, one key": ("GPTBigCode", "ForCausalLM", GPT | {"multi_query": True}, "c_attn"),
    "BigCode": ("GPTBigCode", "ForCausalLM", GPT | {"multi_query": False}, "c_attn"),
    "Phi3": ("Phi3", "ForCausalLM", SMALL | {"num_key_value_heads": 2}, "qkv_proj"),
    "GPTNeoX": ("GPTNeoX", "ForCausalLM", SMALL, "query_key_value"),
    "Bloom": (
        "Bloom",
        "ForCausalLM",
        {"hidden_size": 16, "n_layer": 1, "n_head": 4, "vocab_size": 32},
        "query_key_value",
    ),
    "Persimmon": ("Persimmon", "ForCausalLM", SMALL, "query_key_value"),
    "Falcon": ("Falcon", "ForCausalLM", FALCON | {"multi_query": False}, "query_key_value"),
    "Falcon, one key": ("Falcon", "ForCausalLM", FALCON | {"multi_query": True}, "query_key_value"),
    "Falcon, new": (
        "Falcon",
        "ForCausalLM",
        FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2},
        "query_key_value",
    ),
    "ModernBert": ("ModernBert", "ForMaskedLM", SMALL, "Wqkv"),
    "CodeGen": ("CodeGen", "ForCausalLM", GPT | {"rotary_dim": 2}, "qkv_proj"),
    "Mpt": (
        "Mpt",
        "ForCausalLM",
        {"d_model": 16, "n_layers": 1, "n_heads": 4, "vocab_size": 32, "max_seq_len": 32},
        "Wqkv",
    ),
}


def built(name: str) -> nn.Module:
    family, tail, sizes, _ = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**sizes)
    config._attn_implementation = "eager"
    model: nn.Module = getattr(transformers, family + tail)(config).eval()
    return model


@pytest.mark.parametrize("part", ["q", "k", "v"])
@pytest.mark.parametrize("name", MODELS)
def test_the_layout_is_that_of_the_model(name, part, monkeypatch):
    """With B zero but for a part, what attention gets as that alone changes; whole heads of it, as the formula says."""
    target = MODELS[name][3]
    model = built(name)
    patch = graphpatch.apply(model, graphpatch.parse(f'patch {target} with lora(rank=2, parts=["{part}"]){FREEZE}'))
    inner = next(m for n, m in model.named_modules() if n.endswith(target))
    calls: list[list[Tensor]] = []
    watch(monkeypatch, model, calls)
    ids = torch.arange(1, 9).view(1, 8)
    inputs: list[Tensor] = []
    hook = inner.register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
    model(ids)
    randomise(patch)
    model(ids)
    hook.remove()
    assert len(calls) == 2
    before, after = calls
    for at, seen in enumerate("qkv"):
        changed = not torch.equal(before[at], after[at])
        assert changed == (seen == part), f"{seen} changes with {part}"
    if part == "v":  # keys and queries turn with their positions
        delta = inputs[0] @ inner.lora_A.t() @ inner.lora_B.t()
        heads = (after[2] - before[2]).flatten(0, 1) if after[2].dim() == 4 else after[2] - before[2]
        heads = heads.transpose(0, 1).reshape(8, -1) if heads.shape[-2] == 8 else heads
        size = inner.lora_B.shape[0]
        own = heads.reshape(8, -1)
        if own.shape[1] != size:  # broadcast over the queries of their group
            groups = size // heads_size(model)
            own = own.view(8, groups, -1, heads_size(model))[:, :, 0].reshape(8, -1)
        torch.testing.assert_close(own, delta.view(8, -1), rtol=1e-4, atol=1e-5)


def heads_size(model: nn.Module) -> int:
    config = model.config
    return config.hidden_size // config.num_attention_heads


def watch(monkeypatch, model: nn.Module, calls: list[list[Tensor]]) -> None:
    """See queries, keys and values as they come to attention."""
    family = type(model).__module__
    module = __import__(family, fromlist=["x"])
    if hasattr(module, "eager_attention_forward"):
        real = module.eager_attention_forward

        def seen(layer, q, k, v, *args, **kwargs):
            calls.append([t.detach().clone() for t in (q, k, v)])
            return real(layer, q, k, v, *args, **kwargs)

        monkeypatch.setattr(module, "eager_attention_forward", seen)
        return
    for cls, method in (("BloomAttention", "_reshape"), ("FalconAttention", "_split_heads")):
        if hasattr(module, cls):
            split = getattr(getattr(module, cls), method)

            def parts(self, fused, split=split):
                found = split(self, fused)
                calls.append([t.detach().clone() for t in found])
                return found

            monkeypatch.setattr(getattr(module, cls), method, parts)
            return
    if hasattr(module, "CodeGenAttention"):
        attend = module.CodeGenAttention._attn

        def attended(self, q, k, v, *args):
            calls.append([t.detach().clone() for t in (q, k, v)])
            return attend(self, q, k, v, *args)

        monkeypatch.setattr(module.CodeGenAttention, "_attn", attended)
        return
    chunk = Tensor.chunk  # MPT splits where it stands

    def chunked(self, n, *args, **kwargs):
        found = chunk(self, n, *args, **kwargs)
        if n == 3:
            calls.append([t.detach().clone() for t in found])
        return found

    monkeypatch.setattr(Tensor, "chunk", chunked)


@pytest.mark.parametrize("part", ["gate", "up"])
@pytest.mark.parametrize("family", ["Phi3", "Glm"])
def test_gate_and_up(family, part):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SMALL, num_key_value_heads=2, head_dim=4)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    patch = graphpatch.apply(model, graphpatch.parse(f'patch gate_up_proj with lora(rank=2, parts=["{part}"]){FREEZE}'))
    mlp = next(m for n, m in model.named_modules() if n.endswith(".mlp"))
    x = torch.randn(3, 16)
    gate, up = mlp.gate_up_proj(x).chunk(2, -1)
    randomise(patch)
    delta = x @ mlp.gate_up_proj.lora_A.t() @ mlp.gate_up_proj.lora_B.t()
    gate, up = (gate + delta, up) if part == "gate" else (gate, up + delta)
    torch.testing.assert_close(mlp(x), mlp.down_proj(up * nn.functional.silu(gate)))


def test_a_subclass_of_ones_own_may_split_otherwise():
    model = built("GPTNeoX")
    attention = model.gpt_neox.layers[0].attention
    attention.__class__ = type("Mine", (type(attention),), {"__module__": "mine"})
    text = f'patch query_key_value with lora(rank=2, parts=["q"]){FREEZE}'
    assert "query_key_value of Mine" in refused("GP459", model, text)
    said = text.replace("]", '], layout=[["q", 4], ["k", 4], ["v", 4]], groups=4')
    assert len(graphpatch.parse(said).plan(model).changes) == 1


def test_the_plan_says_the_layout():
    plan = graphpatch.parse(f'patch query_key_value with lora(rank=2, parts=["q", "v"]){FREEZE}').plan(built("GPTNeoX"))
    assert 'layout=[["q", 4], ["k", 4], ["v", 4]], groups=4' in plan.steps[0].op.text()
    again = graphpatch.Plan.from_json(plan.to_json())
    assert again.steps[0].op == plan.steps[0].op


@pytest.mark.parametrize(
    ("code", "make", "arguments", "said"),
    [
        ("GP459", lambda: nn.Linear(6, 12), 'parts=["q"]', "is not known"),
        ("GP459", lambda: nn.Linear(6, 12), 'parts=["q"], layout=[["q", 4], ["k", 4]]', "8 rows"),
        ("GP459", lambda: nn.Linear(6, 12), 'parts=["x"], layout=[["q", 4], ["k", 8]]', "none called `x`"),
        ("GP410", lambda: nn.Embedding(6, 12), 'parts=["q"], layout=[["q", 4]]', "no linear made of several"),
        ("GP204", lambda: nn.Linear(6, 12), 'layout=[["q", 12]]', "with `parts` alone"),
        ("GP204", lambda: nn.Linear(6, 12), 'parts=["q", "q"], layout=[["q", 12]]', "each once"),
        ("GP204", lambda: nn.Linear(6, 12), 'parts=["q"], layout=[["q", 12]], dora=true', "does not go together"),
        ("GP204", lambda: nn.Linear(6, 12), 'parts=["q"], layout=[["q", 0]]', ""),
    ],
)
def test_what_is_unknown_or_without_effect_is_refused(code, make, arguments, said):
    model = Fused(make())
    before = state(model)
    assert said in refused(code, model, f"patch qkv with lora(rank=2, {arguments}){FREEZE}")
    assert state(model) == before


def test_peft_reads_them_as_one_adapter(tmp_path):
    """Its A and B are those of the whole linear: the parts' ranks beside each other, zeros between their rows."""
    model = built("GPTNeoX")
    rule = f'patch query_key_value with lora(rank=2, alpha=3, parts=["q", "v"]){FREEZE}'
    randomise(patch := graphpatch.apply(model, graphpatch.parse(rule)))
    ids = torch.arange(1, 9).view(1, 8)
    graphpatch.to_peft(patch, tmp_path)
    theirs = peft.PeftModel.from_pretrained(built("GPTNeoX"), tmp_path).eval()
    torch.testing.assert_close(theirs(ids).logits, model(ids).logits)
    back = built("GPTNeoX")
    graphpatch.load_peft(back, tmp_path)
    torch.testing.assert_close(back(ids).logits, model(ids).logits)
