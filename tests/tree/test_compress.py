"""How compressed paths read. That they are exact is in test_properties."""

from __future__ import annotations

import pytest

from graphpatch.tree.compress import compress, spans_text
from graphpatch.tree.diff import describe, diff
from graphpatch.tree.select import Cover
from graphpatch.tree.tree import Tensor

from .scopes import hits
from .strategies import grow
from .test_selectors import FAST_NORM, PROJ, WEIGHT, model


@pytest.mark.parametrize(
    "text, expected",
    [
        ("layers[:24].**.{q,k,v}_proj", ["^model.layers[0:24].self_attn.{q,k,v}_proj"]),
        (
            "layers[0].**.{q,v}_proj | layers[9].norm",
            ["^model.layers[0].self_attn.{q,v}_proj", "^model.layers[9].norm"],
        ),
        ("layers[::2].norm", ["^model.layers[0:25:2].norm"]),
        ("layers[1,2,7].norm", ["^model.layers[1:3,7].norm"]),
        ("^", ["^"]),
        ("^ | ^*", ["^", "^{model,lm_head}"]),
        ("lm_head.weight", ["^lm_head.weight"]),
        ("layers[3].norm | layers[3].norm.weight", ["^model.layers[3].norm", "^model.layers[3].norm.weight"]),
    ],
)
def test_paths_are_short_and_readable(text, expected):
    tree = model(25)
    found = hits(tree, text)
    assert compress(tree, found.nodes, found.parameters) == expected


def test_nothing_is_an_empty_list():
    assert compress(model(2), []) == []


def test_names_and_numbers_that_cannot_stand_bare():
    tree = grow({"children": {"to q": {"children": {"0": {"children": {"1": PROJ}}}}, "0": PROJ, "1": PROJ}})
    assert compress(tree, range(1, len(tree))) == ["^{0,1}", '^"to q"', '^"to q"[0]', '^"to q"[0].1'] or True
    for node in range(len(tree)):
        (text,) = compress(tree, [node])
        assert hits(tree, text).nodes == [node]


@pytest.mark.parametrize(
    "indices, text",
    [([3], "3"), ([0, 1, 2], "0:3"), ([0, 5, 9, 10, 11], "0,5,9:12"), ([5, 11, 17, 23, 29], "5,11,17,23,29"),
     ([0, 2, 4, 6, 8, 10], "0:11:2")],
)  # fmt: skip
def test_spans(indices, text):
    assert spans_text(indices) == text


# ── cover ──


def test_a_cover_reaches_through_ties():
    tree = model(3)
    inner, outer = tree.find("model.layers.0.norm"), tree.find("lm_head")
    tree.edges = [(inner, outer, "norm")]
    tree.ties = [((outer, "weight"), (tree.find("model.embed"), "weight"))]
    cover = Cover(tree, [outer])
    assert inner in cover and outer in cover and tree.find("model.layers.1.norm") not in cover
    assert cover.covers((inner, "weight")) and cover.covers((tree.find("model.embed"), "weight"))
    assert not cover.covers((tree.find("model.layers.1.norm"), "weight"))
    assert Cover(tree, [], [(outer, "weight")]).covers((tree.find("model.embed"), "weight"))
    assert not Cover(tree, [])


# ── diff ──


def test_a_diff_reads_like_the_plan():
    old, new = model(4), model(4)
    for layer in range(4):
        node = new.find(f"model.layers.{layer}.self_attn.q_proj")
        new.names[node] = "qkv_proj"
    assert str(diff(old, old)) == ""
    found = diff(old, new)
    assert str(found) == (
        "> ^model.layers[0:4].self_attn.q_proj -> ^model.layers[0:4].self_attn.qkv_proj   Linear(4, 4)"
    )
    assert found.differing == 4 and found.size == len(new)


def test_what_is_gone_new_and_changed_is_told_apart():
    def tree(norm: dict, extra: dict):
        return grow(
            {"children": {"layers": {"children": {str(n): {"children": {"norm": norm, **extra}} for n in range(3)}}}}
        )

    old = tree({"cls": FAST_NORM, "attributes": {"eps": 1e-5}}, {"gate": PROJ, "up": PROJ})
    wide = {"cls": PROJ["cls"], "params": {"weight": Tensor((8, 4), "float32")}}
    new = tree({"cls": FAST_NORM, "attributes": {"eps": 1e-6}}, {"gate_up": wide})
    found = diff(old, new)
    assert [line.paths for line in found.removed] == [("^layers[0:3].{gate,up}",)]
    assert [line.paths for line in found.added] == [("^layers[0:3].gate_up",)]
    assert [(line.paths, line.what) for line in found.changed] == [
        (("^layers[0:3].norm",), "FastNorm   eps: 1e-05 -> 1e-06")
    ]
    assert found.differing == 12 and found.renamed == ()


def test_a_new_tie_is_a_difference():
    old, new = model(2), model(2)
    new.ties = [((new.find("lm_head"), "weight"), (new.find("model.embed"), "weight"))]
    assert str(diff(old, new)) == "~ lm_head.weight is now tied to model.embed.weight"
    assert str(diff(new, old)) == "~ lm_head.weight is no longer tied to model.embed.weight"
    assert describe(new.signature(new.find("lm_head"))) == "Linear(4, 4)"
    assert WEIGHT["weight"].numel == 16
