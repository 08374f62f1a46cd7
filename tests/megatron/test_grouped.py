"""LoRA on experts that stand together in one module: what experts with linears of their own compute, over any ranks."""

from __future__ import annotations

import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.transformer import TransformerConfig
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import silu

import graphpatch
from graphpatch.megatron import lora_grouped
from graphpatch.patch.patch import patches

from .grouped import HAS_GROUPED_MLP
from .models import BATCH, LENGTH, VOCABULARY, fill, gathered, pieces
from .pool import one, ranks
from .training import assert_same, built, chunks_of, together, trained

KINDS = ["mlp", "engine"] if HAS_GROUPED_MLP else ["engine"]
FROZEN = "freeze ** except @new"
TARGETS = {
    "mlp": "experts.{weight1,weight2}",
    "engine": "experts.{linear_fc1,linear_fc2}",
    None: "local_experts[*].{linear_fc1,linear_fc2}",
}
RULES = {kind: f"patch {target} with lora(rank=4, alpha=8)\n" for kind, target in TARGETS.items()}
LAYOUTS: list[dict[str, int]] = [
    {"ep": 2, "dp": 2},
    {"tp": 2, "etp": 2},
    {"tp": 2, "ep": 2, "etp": 1},
    {"dp": 2, "ep": 2, "pp": 2},
]


def sizes(kind: str | None, **changes: Any) -> dict[str, Any]:
    found = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_aux_loss_coeff": 0.0, "activation_func": silu}
    return {**found, "num_layers": 2, "grouped": kind, "moe_grouped_gemm": kind is not None, **changes}


def case(kind: str | None, ends: str = FROZEN, **changes: Any) -> dict[str, Any]:
    return trained(built(RULES[kind] + ends, **sizes(kind, **changes)))


def sequence_parallel(kind: str | None, ends: str = FROZEN) -> dict[str, Any]:
    return case(kind, ends, sequence_parallel=True)


ALONE: dict[str, Any] = {}


def apart(ends: str = FROZEN) -> dict[str, Any]:
    """Each expert with linears of its own, on one process."""
    if ends not in ALONE:
        ALONE[ends] = one(case, None, ends)
    return ALONE[ends]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", [{}, *LAYOUTS], ids=str)
def test_they_are_experts_with_linears_of_their_own(kind, layout):
    run = sequence_parallel if layout.get("tp") else case
    assert_same(together(ranks(run, kind, **layout)), apart())


BASES = [(kind, layout) for kind in KINDS for layout in ({}, LAYOUTS[0], LAYOUTS[1])]


# The norm that megatron-core tells leaves out what Transformer Engine does not mark as shared.
@pytest.mark.parametrize(("kind", "layout"), [case for case in BASES if case != ("engine", LAYOUTS[1])], ids=str)
def test_beside_a_base_that_trains(kind, layout):
    run = sequence_parallel if layout.get("tp") else case
    assert_same(together(ranks(run, kind, "train **", **layout)), apart("train **"))


def without_summed_gradients(kind: str) -> dict[str, Any]:
    lora_grouped.summed_backward = lambda parameter, module: parameter  # type: ignore[assignment]
    return sequence_parallel(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_sum_is_seen(kind):
    with pytest.raises(AssertionError, match=r"differs|not close"):
        assert_same(together(ranks(without_summed_gradients, kind, tp=2, etp=2)), apart())


def recomputed(kind: str) -> dict[str, Any]:
    return case(kind, recompute_granularity="selective", recompute_modules=["moe_act"])


@pytest.mark.parametrize("kind", KINDS[:-1])  # TEGroupedMLP asks Transformer Engine for its state then
def test_activations_that_are_recomputed(kind):
    assert_same(one(recomputed, kind), apart())


def on_input(kind: str | None) -> dict[str, Any]:
    return case(kind, moe_apply_probs_on_input=True, moe_router_topk=1, moe_router_pre_softmax=True)


@pytest.mark.parametrize("kind", KINDS)
def test_probabilities_that_are_applied_to_the_input(kind):
    assert_same(one(on_input, kind), one(on_input, None))


# ── the start, merging, what is refused ──


def started(kind: str) -> dict[str, torch.Tensor]:
    chunks = chunks_of(**sizes(kind))
    torch.manual_seed(5)
    graphpatch.apply(chunks, graphpatch.parse(RULES[kind] + FROZEN))  # type: ignore[call-overload]
    return factors(chunks)


def factors(chunks: list[nn.Module]) -> dict[str, torch.Tensor]:
    return {
        piece.name: gathered(piece.like, piece.of(parameter.data))
        for chunk in chunks
        for name, parameter in chunk.named_parameters()
        if "lora" in name
        for piece in pieces(chunk, name, parameter)
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS[:3], ids=str)
def test_they_start_from_the_same_at_any_layout(kind, layout):
    alone = one(started, kind)
    assert len({float(value.sum()) for name, value in alone.items() if name.endswith("lora_A")}) == 2 * 2 * 4
    for name, value in alone.items():
        if name.endswith("lora_A"):
            bound = value.shape[1] ** -0.5  # kaiming_uniform_(a=sqrt(5)) over the whole fan-in
            assert 0.8 * bound < value.abs().max() <= bound, name
    for found in ranks(started, kind, **layout):
        assert found
        for name, value in found.items():
            assert torch.equal(value, alone[name]), name


def logits(chunk: Any) -> torch.Tensor:
    ids = torch.arange(BATCH * LENGTH).reshape(BATCH, LENGTH) % VOCABULARY
    with torch.no_grad():
        return chunk(ids, torch.arange(LENGTH).expand(BATCH, LENGTH), None)  # type: ignore[no-any-return]


def merged(kind: str | None) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor], bool]:
    (chunk,) = built(RULES[kind] + FROZEN, **sizes(kind, gather=True))
    chunk.eval()
    before = {n: p.detach().clone() for n, p in chunk.named_parameters()}
    (patch,) = patches(chunk)
    beside = logits(chunk)
    patch.merge()
    there = logits(chunk)
    weights = {
        piece.name: gathered(piece.like, piece.of(p.data))
        for n, p in chunk.named_parameters()
        if ".experts." in n and "lora" not in n
        for piece in pieces(chunk, n, p)
    }
    patch.unmerge()
    return beside, there, weights, all(torch.equal(p, before[n]) for n, p in chunk.named_parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", [{}, {"ep": 2, "dp": 2}, {"tp": 2, "etp": 2}], ids=str)
def test_merged_they_have_the_weights_of_linears_of_their_own(kind, layout):
    want, _, weights, _ = one(merged, None)
    for beside, there, found, back in ranks(merged, kind, **layout):
        assert back and found
        torch.testing.assert_close(beside, want, rtol=1e-5, atol=1e-5 * want.abs().max().item())
        torch.testing.assert_close(there, want, rtol=1e-5, atol=1e-5 * want.abs().max().item())
        for name, value in found.items():
            torch.testing.assert_close(value, weights[name], rtol=1e-5, atol=1e-6)


def without_tokens(kind: str) -> dict[str, Any]:
    (chunk,) = built(RULES[kind] + "train **", **sizes(kind))
    experts: Any = chunk.decoder.layers[0].mlp.experts  # type: ignore[union-attr, index]
    out, _ = experts(torch.zeros(0, 64, requires_grad=True), torch.zeros(4, dtype=torch.int64), torch.zeros(0))
    out.sum().backward()
    return {name: parameter.grad for name, parameter in experts.named_parameters()}


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_a_rank_that_gets_no_tokens_has_gradients_of_zero(kind):
    grads = one(without_tokens, kind)
    assert {"weight1", "weight2", "weight1_lora_A", "weight2_lora_B"} <= grads.keys()
    assert all(grad is not None and not grad.any() for grad in grads.values())


def refused(kind: str, options: str, own_forward: bool = False) -> str:
    (chunk,) = chunks_of(**sizes(kind))
    experts: Any = chunk.decoder.layers[0].mlp.experts  # type: ignore[union-attr, index]
    if own_forward:
        plain = type(experts)
        experts.__class__ = type("Mine", (plain,), {"forward": lambda self, *given: plain.forward(self, *given)})
    before = type(experts)
    target = f"layers[0].**.{TARGETS[kind]}"
    try:
        graphpatch.apply(chunk, graphpatch.parse(f"patch {target} with lora(rank=4{options})"))
    except graphpatch.Error as error:
        assert type(experts) is before
        return error.code
    return ""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [", dora=true", ", bias=true", ', init="pissa"', ', parts=["q"]'])
def test_options_without_effect_there_are_refused(kind, options):
    assert one(refused, kind, options) == "GP410"


def bypassed(**changes: Any) -> str:
    (chunk,) = chunks_of(**sizes("engine"))
    for module in chunk.modules():
        if hasattr(module, "config"):
            module.config.__dict__.update(changes)  # type: ignore[union-attr, arg-type]
    with pytest.raises(graphpatch.Error) as caught:
        graphpatch.apply(chunk, graphpatch.parse(RULES["engine"] + FROZEN))
    return caught.value.code


OTHERWISE = [({"moe_mlp_glu_interleave_size": 32}, "GP951")]
if "use_transformer_engine_op_fuser" in TransformerConfig.__dataclass_fields__:
    OTHERWISE.append(({"use_transformer_engine_op_fuser": True}, "GP503"))  # of experts, in later releases


@pytest.mark.parametrize(("changes", "code"), OTHERWISE, ids=str)
def test_what_computes_past_the_linears_or_lays_their_rows_otherwise_is_refused(changes, code):
    assert one(partial(bypassed, **changes)) == code


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_experts_with_a_forward_of_their_own_are_refused(kind):
    assert one(refused, kind, "", True) == "GP523"


def told_of(kind: str, ends: str, write: str) -> str:
    chunks = built(f"use hf_mixtral\n{RULES[kind]}{ends}", **sizes(kind))
    with tempfile.TemporaryDirectory() as folder, pytest.raises(graphpatch.Error) as caught:
        getattr(graphpatch, write)(patches(chunks[0])[0], f"{folder}/out")
    return caught.value.code


@pytest.mark.parametrize("kind", KINDS)
def test_peft_has_no_form_for_them(kind):
    assert one(told_of, kind, FROZEN, "to_peft") in {"GP625", "GP952"}


def test_weights_that_train_and_are_called_otherwise_on_other_ranks_are_refused():
    assert ranks(told_of, "engine", "train **", "save_adapter", ep=2, dp=2) == ["GP953"] * 2


def dropped(kind: str | None, sequence_parallel: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rules = RULES[kind].replace("alpha=8", "alpha=8, dropout=0.5") + FROZEN
    (chunk,) = built(rules, **sizes(kind, gather=True, sequence_parallel=sequence_parallel))
    with torch.no_grad():
        first, second = (logits(chunk.train()) for _ in range(2))
        return first, second, logits(chunk.eval())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", [{}, {"tp": 2, "etp": 2}], ids=str)
def test_dropout_draws_in_training_alone(kind, layout):
    want = one(dropped, None)[2]
    found = ranks(dropped, kind, bool(layout), **layout)
    for first, second, quiet in found:
        assert (first - second).abs().max() > 1e-3
        torch.testing.assert_close(quiet, want, rtol=1e-5, atol=1e-5 * want.abs().max().item())
        # Ranks that share experts have the same outputs, whatever was drawn.
        torch.testing.assert_close(first, found[0][0], rtol=1e-5, atol=1e-5 * want.abs().max().item())


# ── checkpoints and files ──


def wrote(kind: str, folder: str, adapter: str) -> Any:
    chunks = built(RULES[kind] + FROZEN, **sizes(kind, gather=True))
    held = {n: e for n, e in chunks[0].sharded_state_dict(metadata={}).items() if "lora" in n}  # type: ignore[operator]
    dist_checkpointing.save(held, folder)
    graphpatch.save_adapter([patches(chunk)[0] for chunk in chunks], adapter)
    return factors(chunks)


def read(kind: str, folder: str, adapter: str, again: str) -> Any:
    chunks = built(RULES[kind] + FROZEN, **sizes(kind, gather=True))
    for chunk in chunks:
        fill(chunk, lambda n: "lora" in n, seed=3)
    held = {n: e for n, e in chunks[0].sharded_state_dict(metadata={}).items() if "lora" in n}  # type: ignore[operator]
    chunks[0].load_state_dict(dist_checkpointing.load(held, folder), strict=False)
    loaded = factors(chunks)
    for chunk in chunks:
        patches(chunk)[0].revert()
    graphpatch.save_adapter(graphpatch.load_adapter(chunks, adapter), again)
    return loaded, factors(chunks)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("first", "second"),
    [(LAYOUTS[0], LAYOUTS[1]), (LAYOUTS[1], {}), ({}, LAYOUTS[2]), (LAYOUTS[2], LAYOUTS[0])],
    ids=str,
)
def test_checkpoints_and_files_at_another_layout(tmp_path, kind, first, second):
    folder, adapter, again = (str(tmp_path / name) for name in ("shards", "adapter", "again"))
    Path(folder).mkdir()
    whole: dict[str, torch.Tensor] = {}
    for part in ranks(wrote, kind, folder, adapter, **first):
        whole |= part
    assert len(whole) == 2 * 4 * 2 * 2
    for found in ranks(read, kind, folder, adapter, again, **second):
        for values in found:
            assert values and all(torch.equal(value, whole[name]) for name, value in values.items())
    tensors = load_file(f"{adapter}/adapter.safetensors")
    assert len(tensors) == 2 * 2 * 2 and all(value.shape[0] == 4 for value in tensors.values())
    assert Path(again, "adapter.safetensors").read_bytes() == Path(adapter, "adapter.safetensors").read_bytes()
    said, other = (json.loads(Path(f, "adapter.json").read_text()) for f in (adapter, again))
    assert said["changes"] == other["changes"] and said["tensors"] == other["tensors"]
    assert said["base"]["weights"] == other["base"]["weights"]
