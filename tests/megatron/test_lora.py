"""LoRA over ranks is LoRA on one: forward, gradients of all that trains, their norm, and five steps of Adam."""

from __future__ import annotations

from typing import Any

import pytest

from .pool import one, ranks
from .training import assert_same, built, together, trained

LINEARS = "patch :ColumnParallelLinear | :RowParallelLinear with lora(rank=4, alpha=8{}) expect any\n"
FROZEN = "freeze ** except @new"
RULES = {
    "lora": LINEARS.format("") + FROZEN,
    "the base trains too": LINEARS.format("") + "train **",
    "bias": LINEARS.format(", bias=true") + FROZEN,
    "dora": LINEARS.format(", dora=true") + FROZEN,
    "embedding": "patch :VocabParallelEmbedding with lora(rank=4, alpha=8) expect any\n" + FROZEN,
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
