"""One plan for a model whose layers stand on several ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import graphpatch
import graphpatch.megatron
from graphpatch.tree.tree import Tree

from .models import gpt
from .pool import one, ranks
from .training import chunks_of

LAYERS = "patch ^decoder.layers[1:3].self_attention.linear_qkv with lora(rank=2) expect 2\nfreeze ** except @new"


def adapted(rules: str, **options: Any) -> Any:
    """The numbers of the layers that have an adapter on this rank, and the whole plan."""
    chunks = chunks_of(**options)
    patches = graphpatch.apply(chunks, graphpatch.parse(rules))
    layers = [layer for chunk in chunks for layer in chunk.decoder.layers]
    found = [layer.layer_number - 1 for layer in layers if any("lora" in n for n, _ in layer.named_parameters())]
    keys = sorted(key for patch in patches for key in patch.adapter_state_dict())
    plan = str(graphpatch.megatron.plan(chunks_of(**options), graphpatch.parse(rules)))
    before = [chunk.state_dict().keys() for chunk in chunks_of(**options)]
    for patch in patches:
        patch.revert()
    assert [chunk.state_dict().keys() for chunk in chunks] == before
    return found, keys, plan


@pytest.mark.parametrize("layout", [{}, {"pp": 2}, {"pp": 2, "vpp": 2}, {"tp": 2, "pp": 2}], ids=str)
def test_a_layer_is_that_of_the_whole_model(layout):
    found = ranks(adapted, LAYERS, **layout)
    assert {number for numbers, _, _ in found for number in numbers} == {1, 2}
    assert {k for _, keys, _ in found for k in keys} == {
        f"decoder.layers.{at}.self_attention.linear_qkv.lora_{which}" for at in (1, 2) for which in "AB"
    }
    assert len({plan for _, _, plan in found}) == 1
    assert all(len(numbers) < 2 for numbers, _, _ in found if layout.get("pp"))


def whole_tree(**options: Any) -> str:
    return graphpatch.megatron.plan(chunks_of(**options), graphpatch.parse("freeze **")).tree.to_text()


def test_the_tree_is_that_of_one_process():
    alone = Tree.from_text(one(whole_tree))
    for layout in ({"pp": 2}, {"pp": 2, "vpp": 2}):
        for text in ranks(whole_tree, **layout):
            tree = Tree.from_text(text)
            assert tree.paths == alone.paths and tree.lengths == alone.lengths
            assert [tree.signature(n).mro for n in range(len(tree))] == [
                alone.signature(n).mro for n in range(len(alone))
            ]


def with_experts(rules: str) -> Any:
    return adapted(rules, num_moe_experts=4, moe_router_topk=2)


def test_an_expert_is_that_of_the_whole_model():
    rules = "patch ^decoder.layers[0].mlp.experts.local_experts[1:3].linear_fc1 with lora(rank=2) expect 2"
    found = ranks(with_experts, rules, ep=2, dp=2)
    assert [keys for _, keys, _ in found] == [
        [f"decoder.layers.0.mlp.experts.local_experts.{at}.linear_fc1.lora_{x}" for x in "AB"] for at in (1, 2)
    ]


def on_the_last_stage(rules: str) -> int:
    chunks = chunks_of()
    return len(list(graphpatch.apply(chunks, graphpatch.parse(rules))[0].adapter_state_dict()))


def test_what_is_on_one_stage_alone_is_no_error_on_the_other():
    assert ranks(on_the_last_stage, "patch ^output_layer with lora(rank=2)", pp=2) == [0, 2]


def refused(rules: list[str], **options: Any) -> Any:
    chunks = chunks_of(**options)
    before = [(n, id(p), p.requires_grad) for chunk in chunks for n, p in chunk.named_parameters()]
    try:
        graphpatch.apply(chunks, graphpatch.parse(rules[torch.distributed.get_rank() % len(rules)]))
    except graphpatch.Error as error:
        assert before == [(n, id(p), p.requires_grad) for chunk in chunks for n, p in chunk.named_parameters()]
        assert all("Lora" not in type(m).__name__ for chunk in chunks for m in chunk.modules())
        return error.code, str(error)
    return None


def test_nothing_matched_is_judged_over_the_whole_model():
    found = ranks(refused, ["patch nowhere with lora(rank=2)"], pp=2)
    assert [code for code, _ in found] == ["GP401", "GP401"]
    counted = ranks(refused, [LAYERS.replace("expect 2", "expect 1")], pp=2)
    assert len({text for _, text in counted}) == 1 and counted[0][0].startswith("GP4")


def test_other_rules_on_another_rank_are_told_on_all():
    found = ranks(refused, [LAYERS, LAYERS.replace("rank=2", "rank=3")], tp=2)
    assert {code for code, _ in found} == {"GP931"}
    assert all("rank 1 and rank 0 do not have the same rules" in text and "rank=3" in text for _, text in found)


def odd_one(rules: str) -> Any:
    chunks = chunks_of()
    if torch.distributed.get_rank() == 1:
        chunks[0].output_layer.weight.shared_embedding = True  # as megatron marks one that is the embedding's too
    try:
        graphpatch.apply(chunks, graphpatch.parse(rules))
    except graphpatch.Error as error:
        assert not any("lora" in n for chunk in chunks for n, _ in chunk.named_parameters())
        return error.code, str(error)
    return None


def test_what_one_rank_refuses_stops_all():
    found = ranks(odd_one, "patch linear_qkv | output_layer with lora(rank=2)", pp=2)
    assert found[1] is not None and found[0] is not None
    assert found[0][0] == "GP930" and "rank 1 cannot go on" in found[0][1]
    assert found[1][0] != "GP930"


def test_the_whole_is_planned_from_a_config_on_the_meta_device():
    def planned() -> Any:
        with torch.device("meta"):
            model = gpt()
        plan = graphpatch.parse(LAYERS).plan(model)
        return [change.path for change in plan.changes]

    assert one(planned) == [f"decoder.layers.{at}.self_attention.linear_qkv" for at in (1, 2)]
