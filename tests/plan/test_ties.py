"""A weight that two modules share: an op is told, and LoRA refuses to change one side of it."""

from __future__ import annotations

import pytest
from torch import nn

import graphpatch
from graphpatch.ops.op import Op, Target
from graphpatch.plan.drafts import _by_ties
from tests.toys import meta_lm

TIED = graphpatch.Tree.of(meta_lm(layers=2, tied=True))


def refusal(text: str, tree: graphpatch.Tree = TIED) -> graphpatch.Error:
    with pytest.raises(graphpatch.PlanError) as caught:
        graphpatch.parse(text).plan(tree)
    return caught.value


@pytest.mark.parametrize(("target", "other"), [("lm_head", "model.embed_tokens"), ("model.embed_tokens", "lm_head")])
def test_lora_on_one_side_of_a_tie_is_an_error_that_names_the_other(target, other):
    error = refusal(f"patch ^{target} with lora(rank=2)")
    assert error.code == "GP424" and f"`{other}.weight`" in str(error) and f"except ^{target}" in str(error)


def test_all_linears_of_a_tied_model_are_those_that_are_not():
    error = refusal("patch :Linear with lora(rank=2)")
    assert error.code == "GP424" and "`lm_head` cannot take lora" in str(error)
    fixed = graphpatch.parse("patch :Linear with lora(rank=2) except ^lm_head\nfreeze ** except @new").plan(TIED)
    assert len(fixed.changes) == 2 * 6 and "lm_head" not in {c.path for c in fixed.changes}


def test_an_untied_model_has_no_ties_to_refuse():
    plan = graphpatch.parse("patch ^lm_head with lora(rank=2)\nfreeze ** except @new").plan(meta_lm(layers=2))
    assert [c.path for c in plan.changes] == ["lm_head"]


def test_ties_survive_the_text_form():
    assert refusal("patch ^lm_head with lora(rank=2)", graphpatch.Tree.from_text(TIED.to_text())).code == "GP424"


def test_a_shared_bias_is_no_hindrance():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model["b"].bias = model["a"].bias
    assert len(graphpatch.parse("patch :Linear with lora(rank=2)\nfreeze ** except @new").plan(model).changes) == 2


def test_an_op_is_told_of_every_other_path():
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in "abcd"})
    model["b"].weight = model["c"].weight = model["a"].weight
    seen: dict[str, dict] = {}
    after: dict[str, set[str]] = {}

    class Told(Op):
        accepts = {"*": "x:Y"}

        def check(self, target: Target) -> None:
            seen[target.path] = dict(target.tied)
            after[target.path] = set(target.later)

    tree = graphpatch.Tree.of(model)
    told = Told()
    for _, nodes, tied, later in _by_ties(tree, {(0, 0, None): [tree.find(name) for name in "abcd"]}):
        told.check(Target(tree.paths[nodes[0]], tree.signature(nodes[0]), tied=tied, later=later))
    assert seen == {
        "a": {"weight": ("b.weight", "c.weight")},
        "b": {"weight": ("a.weight", "c.weight")},
        "c": {"weight": ("a.weight", "b.weight")},
        "d": {},
    }
    assert after == {"a": set(), "b": {"weight"}, "c": {"weight"}, "d": set()}
