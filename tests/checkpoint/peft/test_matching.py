"""What a config matches: ours against PEFT's own function, on names and configs made at random, and on real models."""

from __future__ import annotations

import random
import re

import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import (
    _ExcludedModule,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils.other import get_pattern_key
from torch import nn

import graphpatch
from graphpatch.checkpoint.peft.config import config_of
from graphpatch.checkpoint.peft.defaults import BY_MODEL_TYPE
from graphpatch.checkpoint.peft.matching import targets, value_of
from graphpatch.checkpoint.peft.moe import RENAMED
from graphpatch.checkpoint.peft.rules import from_peft
from tests.checkpoint.peft.models import ConvNet, bert, deepseek, gpt2, llama, t5

SEGMENTS = ["layers", "h", "q_proj", "proj", "attn", "mlp", "head", "lm_head", "0", "1", "2", "down-0", "x"]


class Tower(nn.Module):
    """A linear under each of the names, and bare modules on the way."""

    def __init__(self, names: list[str]):
        super().__init__()
        for name in names:
            at: nn.Module = self
            *way, last = name.split(".")
            for segment in way:
                if segment not in at._modules:
                    at.add_module(segment, nn.Module())
                at = at._modules[segment]  # type: ignore[assignment]
            at.add_module(last, nn.Linear(2, 2))


def names_at_random(rng: random.Random) -> list[str]:
    """Of linears, none below another."""
    names = {".".join(rng.choices(SEGMENTS, k=rng.randint(1, 6))) for _ in range(30)}
    return sorted(n for n in names if not any(m != n and m.startswith(n + ".") for m in names))


def config_at_random(rng: random.Random, names: list[str]) -> dict:
    def end() -> str:
        name = rng.choice(names).split(".")
        return ".".join(name[-rng.randint(1, len(name)) :])

    def key() -> str:
        return rng.choice([end(), re.escape(end()), "^" + re.escape(rng.choice(names)), r".*\.\d\..*proj", "q_proj|x"])

    made = {"peft_type": "LORA", "r": 4, "lora_alpha": 6}
    if rng.random() < 0.25:
        made["target_modules"] = rng.choice([r".*(q_proj|head)", r"layers\.\d+\..*", r".*\.(?!0)\d\..*", "proj|x"])
    else:
        made["target_modules"] = [end() for _ in range(rng.randint(1, 4))]
        if rng.random() < 0.4:
            made["layers_to_transform"] = rng.choice([0, [0, 2], [1], [7], [-1], []])
            if rng.random() < 0.5:
                made["layers_pattern"] = rng.choice(["layers", ["h", "layers"], "h", [], r"attn\.layers"])
    if rng.random() < 0.4:
        made["exclude_modules"] = rng.choice([[end(), end()], r".*\.1\..*", [end()], "x|.*head"])
    if rng.random() < 0.3:
        made["modules_to_save"] = rng.choice([["head"], ["lm_head", "mlp"], ["x"]])
    if rng.random() < 0.5:
        made["rank_pattern"] = {key(): r for r in rng.sample([1, 2, 3, 5], k=rng.randint(1, 3))}
    if rng.random() < 0.4:
        made["alpha_pattern"] = {key(): a for a in rng.sample([1, 2.5, 3], k=rng.randint(1, 2))}
    return made


@pytest.mark.parametrize("seed", range(80))
def test_a_config_reaches_what_it_reaches_in_peft(seed):
    rng = random.Random(seed)
    model = Tower(names_at_random(rng))
    names = [name for name, _ in model.named_modules()]
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    fields = config_at_random(rng, linears)
    theirs = LoraConfig(**fields)

    expected = {}
    for name in names[1:]:
        found = check_target_module_exists(theirs, name)
        if found and not isinstance(found, _ExcludedModule):
            rank = theirs.rank_pattern.get(get_pattern_key(theirs.rank_pattern.keys(), name), theirs.r)
            alpha = theirs.alpha_pattern.get(get_pattern_key(theirs.alpha_pattern.keys(), name), theirs.lora_alpha)
            expected[name] = (rank, alpha)

    ours = config_of(fields, "it")
    assert targets(ours, names) == list(expected)
    for name, value in expected.items():
        here = (value_of(ours.rank_pattern, name, ours.r), value_of(ours.alpha_pattern, name, ours.lora_alpha))
        assert here == value

    rules = from_peft(fields)
    if not set(expected) <= set(linears):
        with pytest.raises(graphpatch.Error):  # PEFT refuses these too
            rules.plan(model)
        return
    try:
        plan = rules.plan(model)
    except graphpatch.PlanError as error:
        # Nothing to change is refused in PEFT too; a `modules_to_save` that is nowhere is not.
        assert not expected or "modules_to_save" in fields, str(error)
        return
    assert {plan.tree.paths[n]: (step.op.rank, step.op.alpha) for step in plan.steps for n in step.nodes} == expected


@pytest.mark.parametrize("make", [llama, gpt2, bert, t5, deepseek, ConvNet], ids=lambda make: make.__name__)
def test_all_linear_without_weights(make):
    """Nobody names the output layer: it is known by what it is called, where the model is of Transformers."""
    model = make()
    fields = {"peft_type": "LORA", "r": 2, "target_modules": "all-linear"}
    expected = _maybe_include_all_linear_layers(LoraConfig(target_modules="all-linear"), model).target_modules
    assert {change.path for change in from_peft(fields).plan(model).changes} == expected


def test_targets_of_both_kinds_one_of_which_is_nowhere():
    model = llama()
    for modules, parameters in ((["q_proj"], ["experts.gate_up_proj"]), (["wqkv"], ["q_proj.weight"])):
        fields = {"peft_type": "LORA", "target_modules": modules, "target_parameters": parameters}
        assert len(from_peft(fields).plan(model).changes) == 3
    fields = {"peft_type": "LORA", "target_modules": ["wqkv"], "target_parameters": ["experts.gate_up_proj"]}
    with pytest.raises(graphpatch.PlanError):
        from_peft(fields).plan(model)


def test_no_targets_are_those_of_the_model_type():
    fields = {"peft_type": "LORA", "r": 2}
    assert {c.path.rpartition(".")[2] for c in from_peft(fields).plan(llama()).changes} == {"q_proj", "v_proj"}
    assert {c.path.rpartition(".")[2] for c in from_peft(fields).plan(gpt2()).changes} == {"c_attn"}
    with pytest.raises(graphpatch.PlanError):
        from_peft(fields).plan(ConvNet())


def test_the_table_of_model_types_is_that_of_peft():
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as theirs

    assert BY_MODEL_TYPE == theirs


def test_the_table_of_renamed_experts_is_that_of_peft():
    from peft.utils.transformers_weight_conversion import _MODEL_TO_CONVERSION_PATTERN, _MOE_TARGET_MODULE_MAPPING

    kinds = {kind: of for kind, of in _MODEL_TO_CONVERSION_PATTERN.items() if of in _MOE_TARGET_MODULE_MAPPING}
    assert {kind: set(_MOE_TARGET_MODULE_MAPPING[of]) for kind, of in kinds.items()} == {
        kind: set(names) for kind, names in RENAMED.items()
    }
