"""LoRA+: the groups are those of PEFT's optimizer, and hold every trainable parameter once."""

from __future__ import annotations

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from torch import nn

import graphpatch
from tests.toys import lm

RULES = "patch **.{q,v}_proj | **.embed_tokens with lora(rank=2)\nfreeze ** except @new"


def patched() -> graphpatch.Patch:
    return graphpatch.apply(lm(), graphpatch.parse(RULES))


def names(patch: graphpatch.Patch, groups: list[dict]) -> dict[str, tuple[set[str], float, float]]:
    known = {id(p): name for name, p in patch.model.named_parameters()}
    return {g["name"]: ({known[id(p)] for p in g["params"]}, g["lr"], g["weight_decay"]) for g in groups}


def test_the_groups_are_those_of_peft():
    patch = patched()
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj", "embed_tokens"], r=2)
    theirs = peft.get_peft_model(lm(), config)
    for module in (patch.model.model, theirs.base_model.model.model):
        module.norm.requires_grad_(True)
        module.layers[0].mlp.up_proj.requires_grad_(True)
    groups = graphpatch.lora_plus(patch, lr=2e-4, ratio=8, weight_decay=0.1, lr_embedding=3e-5)
    optimizer = create_loraplus_optimizer(
        theirs,
        torch.optim.AdamW,
        lr=2e-4,
        loraplus_lr_ratio=8,
        loraplus_weight_decay=0.1,
        loraplus_lr_embedding=3e-5,
    )
    known = {id(p): name for name, p in theirs.named_parameters()}
    wanted = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = known[id(parameter)].removeprefix("base_model.model.").replace("embedding_", "")
            wanted[name.replace(".default", "").removesuffix(".weight")] = group["lr"], group["weight_decay"]
    found = {}
    for members, lr, decay in names(patch, groups).values():
        for name in members:
            assert name not in found
            found[name.removesuffix(".weight")] = lr, decay
    # A norm that is no nn.LayerNorm decays in PEFT.
    assert found.pop("model.norm") == (16e-4, 0.0) and wanted.pop("model.norm") == (16e-4, 0.1)
    assert found == wanted
    assert sum(len(g["params"]) for g in groups) == len(patch.trainable_parameters())


def test_every_option_has_its_place_and_an_optimizer_takes_the_groups():
    rules = """
        patch **.q_proj with lora(rank=2, dora=true)
        patch **.v_proj with lora(rank=2, bias=true, adapter="other")
        patch **.o_proj with lora(rank=2, init="pissa")
        patch **.embed_tokens with lora(rank=2)
        freeze ** except @new
        train **.lm_head as head
    """
    patch = graphpatch.apply(lm(layers=1), graphpatch.parse(rules))
    groups = names(patch, graphpatch.lora_plus(patch, lr=1e-3))
    attention = "model.layers.0.self_attn"
    assert groups["A"][0] == {
        *(f"{attention}.{n}" for n in ("q_proj.lora_A", "v_proj.lora_A_other", "o_proj.lora_A")),
        "lm_head.weight",
    }
    assert groups["B"][0] == {f"{attention}.{n}" for n in ("q_proj.lora_B", "v_proj.lora_B_other", "o_proj.lora_B")}
    assert groups["B without decay"][0] == {
        f"{attention}.{n}" for n in ("q_proj.lora_magnitude", "v_proj.lora_B_bias_other")
    }
    assert groups["embedding"][0] == {"model.embed_tokens.lora_A", "model.embed_tokens.lora_B"}
    assert groups["A"][1:] == (1e-3, 0.0) and groups["B"][1:] == (16e-3, 0.0) and groups["embedding"][1] == 1e-6
    optimizer = torch.optim.AdamW(graphpatch.lora_plus(patch, lr=1e-3))
    before = {k: v.clone() for k, v in patch.adapter_state_dict().items()}
    patch.model(torch.randint(32, (2, 5))).pow(2).sum().backward()
    optimizer.step()
    assert any(not torch.equal(v, before[k]) for k, v in patch.adapter_state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"lr": 0}, "`lr` must be a number above 0, not 0"),
        ({"lr": "1e-4"}, "`lr` must be a number"),
        ({"lr": float("nan")}, "`lr`"),
        ({"lr": 1e-4, "ratio": -1}, "`ratio`"),
        ({"lr": 1e-4, "weight_decay": -0.1}, "`weight_decay`"),
        ({"lr": 1e-4, "lr_embedding": 0.0}, "`lr_embedding`"),
    ],
)
def test_rates_that_are_none_are_refused(arguments, says):
    with pytest.raises(graphpatch.ApplyError, match=says) as caught:
        graphpatch.lora_plus(patched(), **arguments)
    assert caught.value.code == "GP539"


def test_without_lora_there_is_nothing_to_group():
    model = nn.Sequential(nn.Linear(3, 3))
    patch = graphpatch.apply(model, graphpatch.parse("patch ^0 with scale.output(2)"))
    with pytest.raises(graphpatch.ApplyError, match="no factor of LoRA trains"):
        graphpatch.lora_plus(patch, lr=1e-3)
    frozen = graphpatch.apply(lm(), graphpatch.parse("patch **.q_proj with lora\nfreeze **"))
    with pytest.raises(graphpatch.ApplyError, match="no factor of LoRA trains"):
        graphpatch.lora_plus(frozen, lr=1e-3)
