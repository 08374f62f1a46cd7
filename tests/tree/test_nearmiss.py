"""Why a selector missed, in words."""

from __future__ import annotations

import pytest

from graphpatch.tree.nearmiss import lacking, near_miss
from graphpatch.tree.tree import Tree

from .scopes import compiled, hits
from .strategies import grow
from .test_selectors import block, model, stack


@pytest.mark.parametrize(
    "text, said",
    [
        ("q_prj", ["nothing in the model is called `q_prj`", "did you mean `q_proj`?"]),
        ("^model.layer[0]", ["the children of `model` are embed, layers", "did you mean `layers`?"]),
        ("layers[*].self_attn.w_proj", ["the children of `model.layers[0:6].self_attn` are q_proj, k_proj, v_proj"]),
        ("layers[9].norm", ["`model.layers` has 6: 0 to 5", "`[9]`"]),
        ("layers[7:].norm", ["`model.layers` has 6: 0 to 5", "`[7:]`"]),
        ("^lm_head[0]", ["`lm_head` has no numbered children"]),
        ("^model.layers[0].**.gate", ["nothing below `model.layers[0]` is called `gate`"]),
        ("layers[0].norm:Linear", ["there is `model.layers[0].norm`, but of class `FastNorm`"]),
        ("norm:FastNrm", ["of class `FastNorm`", "did you mean `FastNorm`?"]),
        (":Linaer", ["no module is of class `Linaer`", "did you mean `Linear`?"]),
        ("^lm_haed", ["the children of the root are model, lm_head", "did you mean `lm_head`?"]),
        ("^lm_head:Parameter", ["`lm_head` is a module, not a parameter"]),
        (r"/nothing/", ["no name in the model matches this regex"]),
        ("@x", ["nothing in the model is called `h` or `blocks`"]),
    ],
)
def test_the_nearest_miss(text, said):
    tree = model(6)
    union = compiled(text, x="h[0] | blocks[0]")
    assert len(hits(tree, text, x="h[0] | blocks[0]")) == 0
    miss = near_miss(tree, union, None)
    for part in said:
        assert part in miss.text


def test_the_nearest_miss_of_one_alternative():
    union = compiled("layers[*].self_attn.{q,k,w}_proj")
    at = next(n for n, a in enumerate(union.alternatives) if a.text == "{w}")
    miss = near_miss(model(6), union, at)
    assert "the children of `model.layers[0:6].self_attn` are q_proj, k_proj, v_proj" in miss.text
    assert miss.span == union.alternatives[at].span


def uneven() -> tuple[Tree, list[int]]:
    layers = stack(30)
    for at in (5, 11, 17, 23, 29):
        layers["children"][str(at)] = block("q_proj", "k_proj", "o_proj")
    tree = grow({"children": {"layers": layers}})
    return tree, hits(tree, "layers[*]").nodes


def test_groups_that_lack_what_others_have_are_named():
    tree, groups = uneven()
    wrong = [g for g in groups if tree.indices[g] in (5, 11, 17, 23, 29)]
    text = lacking(tree, groups, hits(tree, "{q,k,v}_proj").nodes, wrong)
    assert text == ("`layers[5,11,17,23,29]` have no `self_attn.v_proj` (they have q_proj, k_proj, o_proj)")


def test_what_a_group_has_but_the_rule_does_not_reach_is_told_apart():
    tree, groups = uneven()
    text = lacking(tree, groups, hits(tree, "layers[1:].**.q_proj").nodes, groups[:1])
    assert "`layers[0]` has `self_attn.q_proj`, but the rule does not reach it there" in text


def test_nothing_sensible_is_nothing():
    tree, groups = uneven()
    assert lacking(tree, groups, hits(tree, "q_proj").nodes, []) == ""
