"""LoRA over ranks is LoRA on one: forward, gradients of all that trains, their norm, and five steps of Adam."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.tensor_parallel import RowParallelLinear
from torch import nn

import graphpatch
from graphpatch.megatron import factors, lora
from graphpatch.patch.patch import patches

from .models import BATCH, LENGTH, VOCABULARY, config, fill, gathered
from .pool import one, ranks
from .training import assert_same, built, chunks_of, together, trained

LINEARS = "patch :ColumnParallelLinear | :RowParallelLinear with lora(rank=4, alpha=8{})\n"
FROZEN = "freeze ** except @new"
RULES = {
    "lora": LINEARS.format("") + FROZEN,
    "the base trains too": LINEARS.format("") + "train **",
    "bias": LINEARS.format(", bias=true") + FROZEN,
    "dora": LINEARS.format(", dora=true") + FROZEN,
    "parts": 'patch linear_qkv with lora(rank=4, parts=["q", "v"])\n'
    'patch linear_fc1 with lora(rank=4, parts=["up"])\n' + FROZEN,
    "embedding": "patch :VocabParallelEmbedding with lora(rank=4, alpha=8)\n" + FROZEN,
}


def case(rules: str, **options: Any) -> dict[str, Any]:
    return trained(built(rules, **options))


def sequence_parallel(rules: str) -> dict[str, Any]:
    return case(rules, sequence_parallel=True)


ALONE: dict[str, Any] = {}


def alone(kind: str) -> dict[str, Any]:
    if kind not in ALONE:
        ALONE[kind] = one(case, RULES[kind])
    return ALONE[kind]


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("run", [case, sequence_parallel])
def test_two_ranks_of_tensor_parallelism_are_one(kind, run):
    assert_same(together(ranks(run, RULES[kind], tp=2)), alone(kind))


@pytest.mark.parametrize("layout", [{"pp": 2}, {"pp": 2, "vpp": 2}, {"tp": 2, "pp": 2}, {"dp": 2}], ids=str)
def test_pipelines_and_replicas_are_one(layout):
    run = sequence_parallel if layout.get("tp") else case
    assert_same(together(ranks(run, RULES["lora"], **layout)), alone("lora"))


def experts(rules: str, **options: Any) -> dict[str, Any]:
    return case(rules, num_moe_experts=4, moe_router_topk=2, moe_aux_loss_coeff=0.0, **options)


@pytest.mark.parametrize("layout", [{"ep": 2, "dp": 2}, {"tp": 2, "etp": 2}, {"tp": 2, "ep": 2, "etp": 1}], ids=str)
def test_experts_over_ranks_are_experts_on_one(layout):
    run = sequence_experts if layout.get("tp") else experts
    assert_same(together(ranks(run, RULES["lora"], **layout)), one(experts, RULES["lora"]))


def sequence_experts(rules: str) -> dict[str, Any]:
    return experts(rules, sequence_parallel=True)


# ── the three mistakes that raise nothing: each is seen ──


def without_summed_gradients(rules: str) -> dict[str, Any]:
    lora.LoraColumnParallel._whole = lambda self, x: x  # type: ignore[method-assign]
    return case(rules)


def without_the_mark_of_sequence_parallelism(rules: str) -> dict[str, Any]:
    plain = lora.replicated_marks
    lora.replicated_marks = lambda module, partial: plain(module, partial=False)  # type: ignore[assignment]
    return sequence_parallel(rules)


@pytest.mark.parametrize("mistaken", [without_summed_gradients, without_the_mark_of_sequence_parallelism])
def test_a_missing_sum_is_seen(mistaken):
    with pytest.raises(AssertionError, match=r"differs|not close"):
        assert_same(together(ranks(mistaken, RULES["lora"], tp=2)), alone("lora"))


# ── checkpoints ──


def outputs(chunks: Any) -> torch.Tensor | None:
    ids = torch.arange(BATCH * LENGTH).reshape(BATCH, LENGTH) % VOCABULARY
    return chunks[0](ids, torch.arange(LENGTH).expand(BATCH, LENGTH), None).detach()


def entries(chunk: nn.Module) -> dict[str, Any]:
    return chunk.sharded_state_dict(metadata={})  # type: ignore[operator, no-any-return]


def saved(rules: str | None, folder: str, only_adapter: bool) -> torch.Tensor | None:
    chunks = built(rules, gather=True)
    whole = entries(chunks[0])
    held = {name: entry for name, entry in whole.items() if "lora" in name or not only_adapter}
    dist_checkpointing.save(held, folder)
    return outputs(chunks) if len(chunks) == 1 and chunks[0].pre_process and chunks[0].post_process else None


def named_and_shaped(rules: str | None, **options: Any) -> dict[str, Any]:
    chunks = built(rules, **options)
    found = {}
    for name, entry in entries(chunks[0]).items():
        for tensor in entry.build() if hasattr(entry, "build") else [entry]:
            found[name, tensor.key] = tuple(getattr(tensor, "global_shape", ()))
    return found


def test_the_base_has_the_keys_and_shapes_of_a_stock_model():
    stock, patched, over_two = (
        one(named_and_shaped, None),
        one(named_and_shaped, RULES["dora"]),
        ranks(named_and_shaped, RULES["dora"], tp=2)[1],
    )
    assert patched == over_two
    assert {k: v for k, v in patched.items() if "lora" not in k[0]} == stock


KINDS_SAVED = {
    "every linear": RULES["lora"],
    "dora": RULES["dora"],
    "parts": 'patch linear_qkv with lora(rank=4, parts=["q", "v"])\n'
    'patch linear_fc1 with lora(rank=4, parts=["gate", "up"])\n' + FROZEN,
    "some layers": "patch ^decoder.layers[1].**:ColumnParallelLinear with lora(rank=4)\n" + FROZEN,
}


@pytest.mark.parametrize("kind", KINDS_SAVED)
@pytest.mark.parametrize("only_adapter", [False, True], ids=["whole", "adapter"])
def test_a_checkpoint_loads_at_another_layout(tmp_path, kind, only_adapter):
    rules, chain = KINDS_SAVED[kind], [{"tp": 2}, {}, {"tp": 2, "pp": 2}, {}]
    results = []
    for at, layout in enumerate(chain):
        folder = tmp_path / str(at)
        folder.mkdir()
        if at:
            results += ranks(reloaded, rules, str(tmp_path / str(at - 1)), str(folder), only_adapter, **layout)
        else:
            results += ranks(saved, rules, str(folder), only_adapter, **layout)
    want = one(alone_outputs, rules)
    assert len([r for r in results if r is not None]) >= len(chain) - 1
    for result in results:
        if result is not None:
            torch.testing.assert_close(result, want, rtol=0, atol=1e-5)


def alone_outputs(rules: str) -> Any:
    return outputs(built(rules, gather=True))


def reloaded(rules: str, source: str, folder: str, only_adapter: bool) -> Any:
    chunks = built(rules, gather=True)
    wanted = lambda name: "lora" in name or not only_adapter  # noqa: E731
    with torch.no_grad():
        for name, parameter in chunks[0].named_parameters():
            if wanted(name):
                parameter.fill_(7)
    held = {n: e for n, e in entries(chunks[0]).items() if wanted(n)}
    chunks[0].load_state_dict(dist_checkpointing.load(held, source), strict=False)
    dist_checkpointing.save({n: e for n, e in entries(chunks[0]).items() if wanted(n)}, folder)
    return outputs(chunks) if chunks[0].pre_process and chunks[0].post_process else None


def written(rules: str | None, folder: str) -> torch.Tensor | None:
    """Save all of a model; its outputs without any adapter."""
    chunks = built(rules, gather=True)
    dist_checkpointing.save(entries(chunks[0]), folder)
    for patch in graphpatch.patches(chunks[0]):
        patch.revert()
    return outputs(chunks) if chunks[0].pre_process and chunks[0].post_process else None


def read(rules: str | None, folder: str) -> torch.Tensor | None:
    """The outputs of a model, any adapter aside, whose base is what a checkpoint has of it."""
    chunks = built(rules, gather=True)
    with torch.no_grad():
        for name, parameter in chunks[0].named_parameters():
            if "lora" not in name:
                parameter.fill_(7)
    held = {name: entry for name, entry in entries(chunks[0]).items() if "lora" not in name}
    missing, unexpected = chunks[0].load_state_dict(dist_checkpointing.load(held, folder), strict=False)
    assert not unexpected and all("lora" in name or "_extra_state" in name for name in missing)
    for patch in graphpatch.patches(chunks[0]):
        patch.revert()
    return outputs(chunks) if chunks[0].pre_process and chunks[0].post_process else None


@pytest.mark.parametrize("first", [None, RULES["dora"]], ids=["stock", "patched"])
def test_base_checkpoints_fit_with_an_adapter_and_without(tmp_path, first):
    want = next(out for out in ranks(written, first, str(tmp_path), tp=2) if out is not None)
    other = RULES["dora"] if first is None else None
    for layout in ({}, {"tp": 2}, {"tp": 2, "pp": 2}):
        for out in ranks(read, other, str(tmp_path), **layout):
            if out is not None:
                torch.testing.assert_close(out, want, rtol=0, atol=1e-5)


def of_odd_length(rules: str) -> dict[str, torch.Tensor]:
    """Eleven tokens, which two ranks do not share evenly: outputs, and the factors' gradients."""
    (chunk,) = built(rules, gather=True)
    ids = torch.arange(BATCH * 11).reshape(BATCH, 11) % VOCABULARY
    out = chunk(ids, torch.arange(11).expand(BATCH, 11), None)
    out.square().mean().backward()
    grads = {n: gathered(p, p.grad) for n, p in chunk.named_parameters() if p.requires_grad}
    return {"out": out.detach(), **grads}


@pytest.mark.parametrize("kind", ["lora", "parts"])
def test_token_counts_that_ranks_do_not_share_evenly(kind):
    alone = one(of_odd_length, RULES[kind])
    for found in ranks(of_odd_length, RULES[kind], tp=2):
        assert found.keys() == alone.keys()
        for name, value in alone.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5)


def as_if_replicated(rules: str, source: str | None, folder: str) -> Any:
    plain = factors._sharded
    factors._sharded = lambda module, key, tensor, dim, metadata: plain(module, key, tensor, None, metadata)
    if source is None:
        return saved(rules, folder, only_adapter=True)
    return reloaded(rules, source, folder, only_adapter=True)


def test_shards_saved_as_if_they_were_the_whole_are_seen(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
    ranks(as_if_replicated, RULES["lora"], None, str(tmp_path / "a"), tp=2)
    found = ranks(as_if_replicated, RULES["lora"], str(tmp_path / "a"), str(tmp_path / "b"), tp=2)
    want = one(alone_outputs, RULES["lora"])
    assert all((result - want).abs().max() > 1e-3 for result in found)


class PostNorm(RowParallelLinear):
    """With a norm fused behind, as specs of Gemma 2 have it."""

    def forward(self, input_: torch.Tensor) -> Any:
        output, bias = super().forward(input_)
        return output * torch.rsqrt(output.square().mean(-1, keepdim=True) + 1e-6), bias


def fused(rules: str) -> dict[str, torch.Tensor]:
    made = config()
    options = {"bias": False, "input_is_parallel": True, "skip_bias_add": True, "config": made}
    model = nn.ModuleDict({"proj": PostNorm(96, 64, init_method=made.init_method, **options)})
    patch = graphpatch.apply(model, graphpatch.parse(rules))
    for parameter in model.parameters():
        parameter.of_expert = False
    fill(model)
    x = torch.randn(LENGTH, BATCH, 96, generator=torch.Generator().manual_seed(2))
    proj: Any = model["proj"]
    part = x.chunk(proj.tp_group.size(), -1)[proj.tp_group.rank()]
    output, _ = proj(part)
    (output * torch.arange(64)).sum().backward()
    found = {"x": x, "y": output.detach()}
    for name in ("weight", "lora_A", "lora_B"):
        found[name] = gathered(getattr(proj, name), getattr(proj, name).data)
    found |= {f"grad of {n}": gathered(p, p.grad) for n, p in proj.named_parameters() if p.grad is not None}
    patch.merge()
    found["merged"] = proj(part)[0].detach()
    return found


def test_a_norm_fused_behind_a_linear_norms_both():
    rules = "patch proj with lora(rank=4, alpha=8)\n" + FROZEN
    alone = one(fused, rules)
    weight = alone["weight"] + 2 * alone["lora_B"] @ alone["lora_A"]
    raw = alone["x"] @ weight.T
    wanted = raw * torch.rsqrt(raw.square().mean(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(alone["y"], wanted, rtol=0, atol=1e-5)
    for found in (alone, *ranks(fused, rules, tp=2)):
        torch.testing.assert_close(found["merged"], found["y"], rtol=0, atol=1e-5)
        assert {n for n in found if "grad" in n} == {"grad of lora_A", "grad of lora_B"}
        for name, value in found.items():
            torch.testing.assert_close(value, alone[name], rtol=1e-4, atol=1e-4)


def two_adapters(**options: Any) -> dict[str, Any]:
    """Both train: each on all linears, and of other ranks."""
    chunks = chunks_of(**options)
    for name, rank, frozen in (("math", 4, FROZEN), ("code", 2, "")):
        rules = LINEARS.format(f', adapter="{name}"').replace("rank=4", f"rank={rank}")
        graphpatch.apply(chunks, graphpatch.parse(rules + frozen))
    for chunk in chunks:
        fill(chunk, lambda n: "lora" in n)
    return trained(chunks)


@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 2}], ids=str)
def test_two_adapters_on_the_same_linears(layout):
    alone = one(two_adapters)
    assert {name.rpartition("_")[2] for name in alone["grads"]} == {"math", "code"}
    assert_same(together(ranks(two_adapters, **layout)), alone)


def merged(rules: str) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor], bool]:
    """Outputs beside and merged, the merged weights, and whether unmerging gives back every bit."""
    (chunk,) = built(rules)
    chunk.eval()
    weights = {n: p for n, p in chunk.named_parameters() if "lora" not in n}
    before = {n: p.detach().clone() for n, p in weights.items()}
    ids = torch.arange(LENGTH * BATCH).reshape(BATCH, LENGTH) % VOCABULARY
    positions = torch.arange(LENGTH).expand(BATCH, LENGTH)
    (patch,) = patches(chunk)
    with torch.no_grad():
        beside = chunk(ids, positions, None)
        patch.merge()
        found = {n: gathered(p, p.data) for n, p in weights.items()}
        there = chunk(ids, positions, None)
    patch.unmerge()
    return beside, there, found, all(torch.equal(p, before[n]) for n, p in weights.items())


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_merged_at_any_size_the_weights_are_those_of_one_process(kind):
    _, _, want, _ = one(merged, RULES[kind])
    for beside, there, found, back in ranks(merged, RULES[kind], tp=2):
        assert back
        torch.testing.assert_close(there, beside, rtol=1e-5, atol=1e-5)
        for name, value in want.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


def recomputed(rules: str) -> dict[str, Any]:
    return case(rules, recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)


@pytest.mark.parametrize("layout", [{}, {"tp": 2}, {"pp": 2}], ids=str)
def test_layers_that_are_recomputed_whole_have_gradients_beside_a_frozen_base(layout):
    assert_same(together(ranks(recomputed, RULES["lora"], **layout)), alone("lora"))
