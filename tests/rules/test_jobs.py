"""The jobs that people bring (`tests/lang/jobs.rules.txt`): those whose ops exist plan on a model they are meant for."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import graphpatch
from graphpatch.lang.parser import parse_rules
from graphpatch.ops.registry import names

from .families import TREES

TEXT = (Path(__file__).parent.parent / "lang" / "jobs.rules.txt").read_text(encoding="utf-8")
JOBS = dict(part.split("\n", 1) for part in re.split(r"^### ", TEXT, flags=re.MULTILINE)[1:])


def family(name: str) -> Callable[[], graphpatch.Tree]:
    return lambda: graphpatch.Tree.read(str(TREES / f"{name}.tree"))


def unet() -> graphpatch.Tree:
    """The names of diffusers' UNet2DConditionModel, where an attention's output is a Sequential of its own."""

    def attention() -> nn.Module:
        one = nn.ModuleDict({f"to_{x}": nn.Linear(4, 4) for x in "qkv"})
        one["to_out"] = nn.ModuleList([nn.Linear(4, 4), nn.Dropout()])
        return one

    def block() -> nn.Module:
        transformer = nn.ModuleDict({"attn1": attention(), "attn2": attention()})
        inner = nn.ModuleDict({"transformer_blocks": nn.ModuleList([transformer])})
        return nn.ModuleDict({"attentions": nn.ModuleList([inner])})

    with torch.device("meta"):
        sides = {side: nn.ModuleList([block() for _ in range(3)]) for side in ("down_blocks", "up_blocks")}
        return graphpatch.Tree.of(nn.ModuleDict(sides))


def odd_names() -> graphpatch.Tree:
    block = nn.Module()
    block.add_module("to q", nn.Linear(4, 4))
    model = nn.Module()
    model.add_module("down-blocks", nn.ModuleList([block]))
    return graphpatch.Tree.of(model)


def few_tokens() -> graphpatch.Tree:
    return graphpatch.Tree.of(nn.ModuleDict({"embed_tokens": nn.Embedding(100, 8)}))


PLANNED: dict[str, tuple[Callable[[], graphpatch.Tree], int, int | None]] = {
    # job: the model, how many changes, how many trainable parameters where the job is about those
    "QLoRA on Llama": (family("llama"), 2 * 7 * 32, None),
    "every other layer": (family("llama"), 32, None),
    "VLM, vision tower untouched": (family("llava"), 96, None),
    "hybrid Mamba/attention": (family("mamba"), 64, None),
    "bitfit": (family("bert"), 0, 12 * (8 * 768 + 3072 - 768) + 3 * 768 + 30_522),
    "LN-tuning": (family("llama"), 0, 65 * 4096),
    "freeze then unfreeze": (family("llama"), 0, None),
    "replace all RMSNorms": (family("gemma2"), 105, None),
    "UNet attention": (unet, 48, None),
    "mixture of LoRA, two adapters on one linear": (family("llama"), 64, None),
    "shared by two models through a parameter": (family("t5"), 12, None),
    "condition on model type": (family("llama"), 0, 0),
    "megatron and HF in one file": (family("llama"), 96, None),
    "first and last layers protected": (family("llama"), 28 * 7, None),
    "override of one layer": (family("llama"), 32, None),
    "odd names": (odd_names, 1, None),
    "RoPE scaling": (family("llama"), 1, None),
    "checkpoint every block": (family("llama"), 32, None),
    "reverse and mixed spans": (family("llama"), 20, None),
    "adapter after each MLP": (family("llama"), 32, None),
    "depth up-scaling": (family("llama"), 1, None),
    "remove layers": (family("llama"), 1, None),
    "by layer type": (family("gemma2"), 13, None),
    "classification head swap": (family("llama"), 1, 3 * 4096),
    "value head": (family("llama"), 1, None),
    "BERT sentence encoder": (family("bert"), 1, None),
    "embedding resize, only new rows": (few_tokens, 1, None),
    "Gemma 2 from Llama": (family("llama"), 2 + 32 + 2 * 32 + 2 * 32 + 65, None),
}


@pytest.mark.parametrize("job", JOBS)
def test_every_job_parses(job: str) -> None:
    assert parse_rules(JOBS[job]).statements


@pytest.mark.parametrize("job", PLANNED)
def test_a_job_plans_on_a_model_it_is_meant_for(job: str) -> None:
    model, changes, trainable = PLANNED[job]
    # One of them names a role and forgets where it comes from.
    text = JOBS[job] if "@" not in JOBS[job] or "use roles" in JOBS[job] else "use roles\n" + JOBS[job]
    plan = graphpatch.parse(text, **PARAMS.get(job, {})).plan(model())
    assert len(plan.changes) == changes
    assert trainable is None or plan.trainable == trainable


PARAMS = {"classification head swap": {"labels": 3}}
"""Of jobs whose params have no default."""


def test_a_job_that_is_not_planned_names_an_op_that_is_to_come() -> None:
    for job in JOBS.keys() - PLANNED.keys():
        called = set(re.findall(r"(?:with|then|insert_after\(.*,) ([\w.]+)", JOBS[job]))
        assert called - set(names()) or "use softcap" in JOBS[job] or job in ARGUMENTS, job


ARGUMENTS = {
    "GPT-2 fused c_attn by part",
    "tied heads",
    "hyper-connection: MHA fused in_proj, q and v",
}
"""Jobs whose op is there, but not yet with the argument that they give it."""


DESIGN = """
use roles
param rank: int = 16

patch @layers[:-8].**.@attention_linears
  with lora(rank=$rank, alpha=2*$rank, dropout=0.05)
  except @tower
  expect 4 per @layers[:-8]

patch @layers[-8:].**.@attention_linears
  with lora(rank=2*$rank, alpha=4*$rank)
  except @tower  expect 4 per @layers[-8:]  as late

freeze ** except @new
"""
"""The first example of design.md, section 2."""


@pytest.mark.parametrize("name, early", [("llama", 24), ("gemma2", 18), ("llava", 24), ("clip", 4), ("bert", 4)])
def test_the_first_example_plans_on_every_family_with_four_linears(name: str, early: int) -> None:
    plan = graphpatch.parse(DESIGN).plan(family(name)())
    assert [outcome.coverage for outcome in plan.outcomes[:2]] == [f"4 x {early}", "4 x 8"]
    assert {change.op for change in plan.changes} == {
        "lora(rank=16, alpha=32, dropout=0.05)",
        "lora(rank=32, alpha=64)",
    }
    assert not plan.warnings and not any("vision" in change.path for change in plan.changes)
    assert graphpatch.Plan.from_json(plan.to_json()).to_json() == plan.to_json()
