"""The packaged rules on real model families, from committed `.tree` files."""

from __future__ import annotations

import pytest
import torch

import graphpatch

from .families import FAMILIES, TREES, build


def tree(family: str) -> graphpatch.Tree:
    return graphpatch.Tree.read(str(TREES / f"{family}.tree"))


LORA = {
    "llama": (128, "4 x 32"),
    "gemma2": (104, "4 x 26"),
    "qwen3_moe": (96, "4 x 24"),
    "gpt2": (24, "2 x 12"),
    "bert": (48, "4 x 12"),
    "t5": (72, "8 x 6 + 4 x 6"),
    "llava": (128, "4 x 32"),
    "mamba": (32, "1 x 32"),
    "gpt_neox": (88, "2 x 44"),
    "phi3": (64, "2 x 32"),
    "vit": (48, "4 x 12"),
    "clip": (48, "4 x 12"),
    "roberta": (48, "4 x 12"),
    "deepseek_v3": (305, "5 x 61"),
    "mixtral": (128, "4 x 32"),
    "gpt_oss": (144, "4 x 36"),
    "opt": (48, "4 x 12"),
    "falcon": (64, "2 x 32"),
    "bloom": (4, "2 x 2"),
    "mpt": (48, "2 x 24"),
    "whisper": (48, "8 x 4 + 4 x 4"),
    "qwen2_vl": (320, "4 x 80"),
    "jamba": (44, "4 x 4 + 1 x 28"),
    "distilbert": (24, "4 x 6"),
    "deberta": (96, "4 x 24"),
}


@pytest.mark.parametrize("family", LORA)
def test_lora_covers_every_block(family):
    plan = graphpatch.load("lora", rank=8).plan(tree(family))
    count, coverage = LORA[family]
    assert len(plan.changes) == count
    assert plan.outcomes[0].coverage == coverage
    assert plan.trainable == plan.totals.parameters_added


def test_a_refusal_of_a_packaged_file_says_how_to_get_one_of_ones_own():
    tree = graphpatch.Tree.of(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    with pytest.raises(graphpatch.PlanError) as caught:
        graphpatch.load("lora").plan(tree)
    assert caught.value.code == "GP401"
    assert "`graphpatch rules lora > my.rules`" in caught.value.diagnostics[-1].fixes[-1]


def test_the_towers_of_a_vision_model_are_left_alone():
    paths = [c.path for c in graphpatch.load("lora").plan(tree("llava")).changes]
    assert all(path.startswith("model.language_model.layers.") for path in paths)


ROLES = {
    # family: layers, block, attn, embed, scaled_embed, head, norm, router, experts, tower
    "llama": (1, 32, 32, 1, 0, 1, 65, 0, 0, 0),
    "gemma2": (1, 26, 26, 1, 1, 1, 105, 0, 0, 0),
    "qwen3_moe": (1, 24, 24, 1, 0, 1, 97, 24, 24, 0),
    "gpt2": (1, 12, 12, 1, 0, 1, 25, 0, 0, 0),
    "bert": (1, 12, 12, 1, 0, 1, 26, 0, 0, 0),
    "t5": (2, 12, 18, 3, 0, 1, 32, 0, 0, 0),
    "mamba": (1, 32, 0, 1, 0, 1, 33, 0, 0, 0),
    "gpt_neox": (1, 44, 44, 1, 0, 1, 89, 0, 0, 0),
    "roberta": (1, 12, 12, 1, 0, 1, 26, 0, 0, 0),
    "deepseek_v3": (1, 61, 61, 1, 0, 1, 245, 58, 58, 0),
    "vit": (1, 12, 12, 0, 0, 0, 25, 0, 0, 0),
    "mixtral": (1, 32, 32, 1, 0, 1, 65, 32, 32, 0),
    "gpt_oss": (1, 36, 36, 1, 0, 1, 73, 36, 36, 0),
    "falcon": (1, 32, 32, 1, 0, 1, 33, 0, 0, 0),
    "mpt": (1, 24, 24, 1, 0, 1, 49, 0, 0, 0),
    "qwen2_vl": (2, 112, 112, 1, 0, 1, 226, 0, 0, 1),
    "distilbert": (1, 6, 6, 1, 0, 1, 14, 0, 0, 0),
}
NAMES = ("layers", "block", "attn", "embed", "scaled_embed", "head", "norm", "router", "experts", "tower")


@pytest.mark.parametrize("family", ROLES)
def test_roles_find_the_parts(family):
    one = tree(family)
    assert {name: len(graphpatch.select(one, f"@{name}")) for name in NAMES} == dict(
        zip(NAMES, ROLES[family], strict=True)
    )


def test_the_scaled_embedding_rule_spares_families_that_scale_already():
    plan = graphpatch.load("scaled_embedding").plan(tree("llama"))
    assert [(c.path, c.op) for c in plan.changes] == [("model.embed_tokens", "scale.output(by=64)")]
    with pytest.raises(graphpatch.PlanError) as caught:
        graphpatch.load("scaled_embedding").plan(tree("gemma2"))
    assert caught.value.code == "GP406"


@pytest.mark.parametrize("family", ["llama", "t5", "qwen3_moe"])
def test_the_fixtures_are_what_the_pinned_library_builds(family):
    assert graphpatch.Tree.of(build(family)).to_text() == (TREES / f"{family}.tree").read_text()


def test_every_family_is_tried():
    assert set(LORA) == set(FAMILIES)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "mixtral", "mamba"])
def test_qlora_quantises_what_it_adapts(family):
    changes = graphpatch.load("qlora", rank=4).plan(tree(family)).changes
    quantised = {c.path for c in changes if c.op.startswith("quantize.nf4")}
    assert quantised and quantised == {c.path for c in changes if c.op.startswith("lora")}
    assert not any("router" in path or path.endswith("head") for path in quantised)
