"""One batch in which each sample has its own adapter: as if each had been run alone with it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graphpatch
from tests.patch.common import patch, state
from tests.patch.test_adapters import IDS, fill, lm, refusal, several

ROWS = ["math", None, "code", "math", (), ("code", "math")]


def alone(model: nn.Module, rows, batch: torch.Tensor) -> torch.Tensor:
    """Sample by sample, each with its adapters active."""
    adapters = graphpatch.adapters(model)
    active, outputs = adapters.active, []
    for at, row in enumerate(rows):
        names = row if isinstance(row, tuple) else (row,) if row in adapters.names else ()
        adapters.activate(*names)
        outputs.append(model(batch[at : at + 1]))
    adapters.activate(*active)
    return torch.cat(outputs)


KINDS = {
    "linear": (lambda: nn.Linear(6, 7), lambda n: torch.randn(n, 6)),
    "linear of sequences": (lambda: nn.Linear(6, 7), lambda n: torch.randn(n, 4, 6)),
    "embedding": (lambda: nn.Embedding(11, 6, padding_idx=0), lambda n: torch.randint(11, (n, 4))),
    "convolution": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), lambda n: torch.randn(n, 4, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, stride=2), lambda n: torch.randn(n, 4, 5, 5)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), lambda n: torch.randn(n, 4, 7)),
}


OPTIONS = {"embedding": ["dora=true"], "transposed": ["bias=true"]}
"""That a kind has; the others have all."""


@pytest.mark.parametrize(
    ("kind", "options", "dtype"),
    [(kind, "dropout=0.1", dtype) for kind in KINDS for dtype in (torch.float32, torch.bfloat16)]
    + [
        (kind, options, torch.float32)
        for kind in KINDS
        for options in OPTIONS.get(kind, ["dora=true", "bias=true", *['init="pissa"'] * kind.startswith("linear")])
    ],
)
def test_each_row_is_what_it_would_be_alone(kind, options, dtype):
    build, batch = KINDS[kind]
    torch.manual_seed(0)
    model = nn.Sequential(build()).to(dtype).eval()
    for at, name in enumerate((None, "math", "code")):
        fill(patch(model, f"patch ^0 with lora(rank={2 * at + 2}, alpha=3, {options})", adapter=name), at)
    x = batch(len(ROWS))
    x = x.to(dtype) if x.is_floating_point() else x
    expected, before, adapters = alone(model, ROWS, x), state(model), graphpatch.adapters(model)
    with adapters.per_sample(ROWS):
        mixed = model(x)
    loose = {"rtol": 0.02, "atol": 0.01} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(mixed, expected, **loose)
    assert state(model) == before
    assert not torch.allclose(mixed, model(x))


def test_on_a_language_model_with_weights_and_an_active_set():
    model = lm()
    adapters = several(model)
    adapters.weights({"math": 0.3})
    adapters.activate("code")
    before = state(model)
    ids = torch.randint(32, (6, 5), generator=torch.Generator().manual_seed(1))
    expected = alone(model, ROWS, ids)
    with adapters.per_sample(ROWS):
        torch.testing.assert_close(model(ids), expected)
    expected = alone(model, ["math"] * 6, ids)
    with adapters.per_sample(["math"] * 6):  # all alike: no rows are told apart
        torch.testing.assert_close(model(ids), expected)
    assert state(model) == before and adapters.active == ("code",)


def test_none_is_no_adapter_where_there_is_no_unnamed_one():
    model = lm()
    base, adapters = model(IDS), several(model, ("math", "code"))
    with adapters.per_sample([None, "math"]):
        mixed = model(IDS)
    torch.testing.assert_close(mixed[:1], base[:1])
    torch.testing.assert_close(mixed, alone(model, [(), "math"], IDS))


def test_a_disabled_patch_is_no_part_of_any_row():
    model = lm()
    base = model(IDS)
    math = fill(patch(model, "patch q_proj with lora(rank=2)", adapter="math"), 0)
    fill(patch(model, "patch v_proj with lora(rank=2)", adapter="code"), 1)
    adapters = graphpatch.adapters(model)
    with math.disabled(), adapters.per_sample(["math", "code"]):
        mixed = model(IDS)
    torch.testing.assert_close(mixed[:1], base[:1])
    torch.testing.assert_close(mixed, torch.cat([base[:1], alone(model, ["code"], IDS[1:])]))


def test_other_ops_and_hooks_on_the_module_stay_where_they_are():
    model = nn.Sequential(nn.Linear(4, 4)).eval()
    patch(model, "patch ^0 with scale.output(3.0)")
    for at, name in enumerate(("math", "code")):
        fill(patch(model, "patch ^0 with lora(rank=2)", adapter=name), at)
    model[0].register_forward_hook(lambda module, args, output: output + 1)
    x = torch.randn(2, 4)
    expected = alone(model, ["math", "code"], x)
    with graphpatch.adapters(model).per_sample(["math", "code"]):
        torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_with_beams(beams):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(**size, num_key_value_heads=2, vocab_size=40, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model = LlamaForCausalLM(config).eval()
    for at, name in enumerate(("math", "code")):
        handle = patch(model, "patch {q,v,up}_proj with lora(rank=2, alpha=30)", adapter=name)
        fill(handle, at)
    adapters, rows, ids = graphpatch.adapters(model), ["code", None, "math"], torch.randint(3, 40, (3, 4))
    options = {"num_beams": beams, "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    expected = []
    for at, row in enumerate(rows):
        adapters.activate(*([row] if row else []))
        expected.append(model.generate(ids[at : at + 1], attention_mask=torch.ones(1, 4), **options))
    with adapters.per_sample(rows):
        mixed = model.generate(ids, attention_mask=torch.ones(3, 4), **options)
    assert torch.equal(mixed, torch.cat(expected)) and len({str(e) for e in expected}) > 1


def test_an_encoder_and_a_decoder_with_more_rows_each_have_their_own():
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    size = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 40}
    model = T5ForConditionalGeneration(T5Config(**size, decoder_start_token_id=0)).eval()
    for at, name in enumerate(("math", "code")):
        fill(patch(model, "patch {q,v,wo} with lora(rank=2, alpha=30)", adapter=name), at)
    adapters, rows, ids = graphpatch.adapters(model), ["code", "math"], torch.randint(3, 40, (2, 4))
    options = {"num_beams": 2, "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    expected = []
    for at, row in enumerate(rows):
        adapters.activate(row)
        expected.append(model.generate(ids[at : at + 1], **options))
    with adapters.per_sample(rows):
        assert torch.equal(model.generate(ids, **options), torch.cat(expected))


class Flat(nn.Module):
    """As OPT has it: the sequence is flattened into the batch."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(x.reshape(-1, 4)).view(x.shape)


def test_a_flattened_batch_has_the_rows_of_a_sample_beside_each_other():
    model = Flat().eval()
    for at, name in enumerate(("math", "code")):
        fill(patch(model, "patch fc with lora(rank=2)", adapter=name), at)
    x = torch.randn(3, 5, 4)
    with graphpatch.adapters(model).per_sample(["code", "math", None]):
        mixed = model(x)
    torch.testing.assert_close(mixed, alone(model, ["code", "math", ()], x))


def test_gradients_are_those_of_each_row_alone():
    model = lm()
    adapters = several(model, ("math", "code"))
    for p in model.parameters():
        p.requires_grad = True
    rows, grads = ["code", "math"], []
    for mixed in True, False:
        model.zero_grad()
        if mixed:
            with adapters.per_sample(rows):
                output = model(IDS)
        else:
            output = alone(model, rows, IDS)
        output.square().sum().backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and any("lora_A_math" in name for name in grads[0])
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-4, atol=1e-5)


# ── what is refused ──


def test_a_batch_that_is_none_of_so_many_samples():
    model = lm()
    adapters = several(model)
    with adapters.per_sample(["math", "code", None]):
        message = refusal("GP548", lambda: model(IDS))
    assert "called with 2 rows, and adapters were chosen for 3 samples" in message
    assert "model.layers.0.self_attn" in message
    before = state(model)
    for rows in [], "math", None, {"math": 1}:
        refusal("GP547", lambda rows=rows: adapters.per_sample(rows).__enter__())
    refusal("GP545", lambda: adapters.per_sample([1, "math"]).__enter__())
    assert state(model) == before


def test_an_input_without_a_batch_is_no_batch():
    for build, x in (lambda: nn.Linear(4, 4), torch.randn(4)), (lambda: nn.Conv2d(4, 4, 3), torch.randn(4, 5, 5)):
        model = nn.Sequential(build()).eval()
        for name in "math", "code":
            patch(model, "patch ^0 with lora(rank=2)", adapter=name)
        with graphpatch.adapters(model).per_sample(["math", "code"]):
            assert "called with 1 rows" in refusal("GP548", lambda model=model, x=x: model(x))
            assert model(torch.randn(0, *x.shape)).shape[0] == 0


class Routed(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.shared_expert = nn.Linear(4, 4)

    def forward(self, x):
        flat = x.reshape(-1, 4)
        out = self.shared_expert(flat)
        for at, expert in enumerate(self.experts):
            hit = (flat[:, 0] > 0).long() == at
            out[hit] = out[hit] + expert(flat[hit])
        return out.view(x.shape)


@pytest.mark.parametrize(
    ("model", "rule", "why"),
    [
        (Routed, "experts[*]", "a router chooses its rows"),
        (lambda: nn.TransformerEncoderLayer(8, 2, 8, batch_first=False), "linear1", "MultiheadAttention"),
        (lambda: nn.Sequential(nn.LSTM(8, 8), nn.Linear(8, 8)), "^1", "LSTM"),
    ],
)
def test_modules_whose_rows_are_no_samples(model, rule, why):
    model = model().eval()
    for name in "math", "code":
        patch(model, f"patch {rule} with lora(rank=2)", adapter=name)
    before, adapters = state(model), graphpatch.adapters(model)
    message = refusal("GP547", lambda: adapters.per_sample(["math", "code"]).__enter__())
    assert why in message and "cannot tell the samples of a batch apart" in message
    assert state(model) == before
    with adapters.per_sample(["math", "math"]):
        assert adapters.active == ("math",)


def test_a_shared_expert_sees_every_row():
    model = Routed().eval()
    for at, name in enumerate(("math", "code")):
        fill(patch(model, "patch shared_expert with lora(rank=2)", adapter=name), at)
    x = torch.randn(2, 3, 4)
    expected = alone(model, ["math", "code"], x)
    with graphpatch.adapters(model).per_sample(["math", "code"]):
        torch.testing.assert_close(model(x), expected)


def test_recomputed_activations_would_forget_the_choice():
    model = lm()
    adapters = several(model, ("math", "code"))
    model.model.gradient_checkpointing = True
    with adapters.per_sample(["math", "code"]):  # in eval mode nothing is recomputed
        model(IDS)
    model.train()
    assert "recomputes" in refusal("GP547", lambda: adapters.per_sample(["math", "code"]).__enter__())


def test_nothing_else_changes_meanwhile():
    model = lm()
    adapters = several(model, ("math", "code"))
    handle = graphpatch.patches(model)[0]
    before = state(model)
    with adapters.per_sample(["math", "code"]):
        inside = state(model)
        for call in (
            lambda: adapters.activate("math"),
            lambda: adapters.weights({"math": 2.0}),
            lambda: adapters.delete("math"),
            lambda: adapters.per_sample(["math", "math"]).__enter__(),
            handle.revert,
            lambda: handle.disabled().__enter__(),
            lambda: patch(model, "patch o_proj with lora(rank=2)", adapter="third"),
        ):
            refusal("GP549", call)
        assert state(model) == inside
    assert state(model) == before


def test_an_error_inside_leaves_the_model_as_it_was():
    model = lm()
    adapters = several(model)
    before = state(model)
    with pytest.raises(ZeroDivisionError), adapters.per_sample(["math", "code"]):
        raise ZeroDivisionError
    assert state(model) == before
