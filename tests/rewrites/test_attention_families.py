"""Attention that differs between Transformers' families, against the family's own source with the cap written in."""

from __future__ import annotations

import ast
import inspect
import sys
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, CLIPTextConfig, CLIPTextModel

from ..patch.common import patch, refused

SIZES: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 40,
    "num_key_value_heads": 2, "head_dim": 4, "pad_token_id": 0,
}  # fmt: skip
IDS = torch.tensor([[3, 4, 5, 6, 7, 8], [9, 10, 11, 12, 13, 14]])
PADDING = torch.zeros(2, 2, dtype=torch.long)
CAP = 0.3
ATTENTION = "use roles\npatch @attn with "


def model_of(kind: str, backend: str = "eager", **options: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZES, **options})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=backend)
    return filled(model)


def filled(model: nn.Module) -> Any:
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.4)
    return model.eval()


def with_the_cap_written_in(module: Any) -> Any:
    """The family's `eager_attention_forward`, with one line after that of the scores."""
    (function,) = ast.parse(inspect.getsource(module.eager_attention_forward)).body
    assert isinstance(function, ast.FunctionDef)
    place = next(
        i for i, line in enumerate(function.body) if ast.unparse(line).startswith("attn_weights = torch.matmul")
    )
    line = ast.parse(f"attn_weights = torch.tanh(attn_weights / {CAP}) * {CAP}").body
    function.body[place + 1 : place + 1] = line
    space = dict(vars(module))
    future = ast.parse("from __future__ import annotations").body
    exec(compile(ast.fix_missing_locations(ast.Module([*future, function], [])), "capped", "exec"), space)
    return space["eager_attention_forward"]


def outputs(model: Any) -> list[torch.Tensor]:
    """Logits and gradients, in training (with its dropout) and not, padded on either side, and what it generates."""
    found = []
    for training in (True, False):
        for ids in (torch.cat([PADDING, IDS], 1), torch.cat([IDS, PADDING], 1)):
            torch.manual_seed(1)
            model.train(training).zero_grad()
            logits = model(ids, attention_mask=(ids != 0).long()).logits[ids != 0]
            logits.square().mean().backward()
            found += [logits.detach(), *(p.grad.clone() for p in model.parameters())]
    return [*found, model.generate(IDS, attention_mask=IDS, max_new_tokens=4, do_sample=False, eos_token_id=None)]


@pytest.mark.filterwarnings("ignore:.*cannot cap")
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [("mistral", {"sliding_window": 4, "attention_dropout": 0.1}), ("gpt_neox", {}), ("olmo2", {}), ("cohere", {})],
)
def test_a_cap_is_as_if_written_into_the_family_s_source(monkeypatch, kind, options, backend):
    ours = model_of(kind, backend, **options)
    patch(ours, f"{ATTENTION}softcap.attention({CAP})")
    found, theirs = outputs(ours), model_of(kind, **options)
    for name in {type(m).__module__ for m in theirs.modules()}:
        if hasattr(sys.modules[name], "eager_attention_forward"):
            monkeypatch.setattr(
                sys.modules[name], "eager_attention_forward", with_the_cap_written_in(sys.modules[name])
            )
    assert all(torch.equal(a, b) for a, b in zip(found, outputs(theirs), strict=True))


def test_sinks_are_refused_and_not_left_out():
    model = model_of("gpt_oss", num_local_experts=2, num_experts_per_tok=1)
    text = refused("GP550", model, f"{ATTENTION}softcap.attention(5.0)")
    assert "GptOssAttention" in text and "sinks" in text
    patch(model, f"{ATTENTION}attention.scale(0.5)").revert()


@pytest.mark.filterwarnings("ignore:.*cannot cap")
@pytest.mark.parametrize("rule", ["softcap.attention(1000000.0)", "attention.window(100)"])
def test_causality_that_is_said_with_the_call_stays(rule):
    config = CLIPTextConfig(**SIZES, max_position_embeddings=8, eos_token_id=39)
    torch.manual_seed(0)
    model = filled(CLIPTextModel._from_config(config, attn_implementation="sdpa"))
    wanted = model(IDS).last_hidden_state
    made = patch(model, ATTENTION + rule)
    assert torch.allclose(model(IDS).last_hidden_state, wanted, atol=1e-5)
    made.revert()
    patch(model, ATTENTION + "attention.causal(false)")
    opened = [model(IDS).last_hidden_state]
    model.set_attn_implementation("eager")
    opened.append(model(IDS).last_hidden_state)
    assert torch.allclose(*opened, atol=1e-5)
    assert (opened[0][:, 0] - wanted[:, 0]).abs().max() > 1e-2


@pytest.mark.filterwarnings("ignore:.*cannot cap")
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_rows_of_padding_are_numbers_under_autocast(backend):
    model = model_of("llama", backend)
    ids = torch.cat([PADDING, IDS], 1)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = model(ids, attention_mask=(ids != 0).long()).logits
        patch(model, f"{ATTENTION}softcap.attention(1000000.0)")
        found = model(ids, attention_mask=(ids != 0).long()).logits
    assert found.isfinite().all()
    assert (found - wanted)[ids != 0].abs().max() < 0.05 * wanted.abs().max()
