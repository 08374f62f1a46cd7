"""What selectors mean, one sentence of design.md at a time."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest

from graphpatch.lang.diagnostics import Error
from graphpatch.lang.syntax import Index, Literal_, PathSelector, Range, SelectorUnion, Step
from graphpatch.tree.globs import glob_regex
from graphpatch.tree.select import compile_selector, match, select_paths
from graphpatch.tree.stacks import stacks
from graphpatch.tree.tree import Tensor, Tree

from .scopes import Roles, compiled, hits, paths
from .strategies import CLASSES, grow

LINEAR, FAST_NORM, OTHER_NORM, BLOCK = CLASSES
WEIGHT = {"weight": Tensor((4, 4), "float32")}
PROJ = {"cls": LINEAR, "params": WEIGHT}


def block(*names: str) -> dict:
    return {
        "children": {
            "self_attn": {"children": dict.fromkeys(names, PROJ)},
            "norm": {"cls": FAST_NORM, "params": WEIGHT},
        }
    }


def stack(size: int, *names: str) -> dict:
    return {"children": {str(at): block(*names or ("q_proj", "k_proj", "v_proj")) for at in range(size)}}


def model(size: int = 25) -> Tree:
    return grow(
        {"children": {"model": {"children": {"embed": {"params": WEIGHT}, "layers": stack(size)}}, "lm_head": PROJ}}
    )


def layers(tree: Tree, text: str) -> list[int]:
    return sorted({int(path.split(".")[2]) for path in paths(tree, text)})


@pytest.mark.parametrize(
    "text, expected",
    [
        ("layers[1].**.q_proj", [1]),  # never 10 to 19
        ("layers[0,5,9:12].**.q_proj", [0, 5, 9, 10, 11]),
        ("layers[-2:].**.q_proj", [23, 24]),
        ("layers[:-22].**.q_proj", [0, 1, 2]),
        ("layers[-1].**.q_proj", [24]),
        ("layers[::8].**.q_proj", [0, 8, 16, 24]),
        ("layers[::-8].**.q_proj", [24, 16, 8, 0][::-1]),
        ("layers[20:99].**.q_proj", [20, 21, 22, 23, 24]),
        ("layers[*].**.q_proj", list(range(25))),
        ("layers.1.**.q_proj", [1]),
        ("layers.*.self_attn.q_proj", list(range(25))),
        ("layers.1*.self_attn.q_proj", []),  # a glob that mixes wildcard and text never matches an index
        ("layers.?.self_attn.q_proj", []),
        ("layers.{1,2}.self_attn.q_proj", [1, 2]),
        ("^model.layers[3].self_attn.q_proj", [3]),
        ("^layers[3].self_attn.q_proj", []),
    ],
)
def test_indices_are_integers(text, expected):
    assert layers(model(), text) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("^", [""]),
        ("^lm_head", ["lm_head"]),
        ("head", []),
        ("*head", ["lm_head"]),
        ("^model.*", ["model.embed", "model.layers"]),
        ("lm_head.*", []),  # a final bare star is about modules only
        ("lm_head.**", ["lm_head"]),
        ("lm_head.w*", ["lm_head.weight"]),
        ("lm_head.*:Parameter", ["lm_head.weight"]),
        ("^model.embed.weight", ["model.embed.weight"]),
        ("^*:Linear", ["lm_head"]),
        ("^*.*.0.norm:Norm", ["model.layers.0.norm"]),
        ("layers[0].norm:=Norm", []),
        ("layers[0].norm:=FastNorm", ["model.layers.0.norm"]),
        ("layers[0].norm:*Norm", ["model.layers.0.norm"]),
        ("layers[0].norm:my.norms.Norm", ["model.layers.0.norm"]),
        ("layers[0].norm:my.Norm", ["model.layers.0.norm"]),  # a public alias of an inner module
        ("layers[0].norm:my.other.Norm", []),
        ("lm_head:torch.nn.Linear", ["lm_head"]),
        ("lm_head:torch.nn.functional.Linear", []),
        ("lm_head:nn.Linear", []),
        ("^lm_head:{Linear,FastNorm}", ["lm_head"]),
        (r"/model\.layers\.2\.norm/", ["model.layers.2.norm"]),
        (r"/layers/", []),  # a full match
        (r"/.*lm_head.*/", ["lm_head"]),  # modules only
        (r"/.*lm_head.*/:Parameter", ["lm_head.weight"]),
        (r"/lm_head|model\.embed/:Linear", ["lm_head"]),
    ],
)
def test_what_a_selector_matches(text, expected):
    assert paths(model(), text) == expected


def test_parameters_are_leaves():
    tree = grow(
        {"children": {"experts": {"params": {"gate_up": Tensor((8, 4, 4), "float32"), "0": Tensor((1,), "float32")}}}}
    )
    assert paths(tree, "experts.gate_up") == ["experts.gate_up"]
    assert paths(tree, "experts[0]") == ["experts.0"]
    assert paths(tree, "gate_up:Linear") == []


def test_select_paths_gives_each_place_once_in_tree_order():
    tree = model(2)
    tree.edges = [(tree.find("model.layers.0.norm"), 0, "norm2")]
    found = select_paths(tree, compiled("norm | norm2 | layers[0].* | ^lm_head | norm.weight"))
    assert found == [
        "model.layers.0.self_attn", "model.layers.0.norm", "model.layers.0.norm.weight", "model.layers.1.norm",
        "model.layers.1.norm.weight", "lm_head",
    ]  # fmt: skip


# ── alternatives ──


def dead(tree: Tree, text: str) -> list[str]:
    union = compiled(text)
    (found,) = match(tree, [union])
    seen = 0
    for hit in [*found.nodes, *found.parameters]:
        seen |= found.alternatives(hit)
    return [a.text for at, a in enumerate(union.alternatives) if not seen >> at & 1]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("self_attn.{q,k,v}_proj", []),
        ("self_attn.{q,k,w}_proj", ["{w}"]),
        ("self_attn.{q,k}_{proj,norm}", ["{norm}"]),
        ("q_proj | w_proj", ["w_proj"]),
        ("q_proj | {k,x}_proj | norm", ["{x}"]),
        ("{self_attn,mlp}.{q,gate}_proj", ["{mlp}", "{gate}"]),
        ("norm:{Norm,Linear}", [":Linear"]),
        ("{q,q}_proj", []),
        ("q_proj", []),
    ],
)
def test_each_alternative_is_judged(text, expected):
    assert dead(model(2), text) == expected


def test_the_place_of_an_alternative_is_its_own_text():
    (alternative,) = [a for a in compiled("layers[*].self_attn.{q,k,w}_proj").alternatives if a.text == "{w}"]
    span = alternative.span
    assert "layers[*].self_attn.{q,k,w}_proj"[span.column - 1 : span.end_column - 1] == "w"


def test_alternatives_inside_a_role_are_not_judged():
    union = compiled("@qkv", qkv="self_attn.{q,k,w}_proj | c_attn")
    assert union.alternatives == []


# ── roles ──


def test_roles_are_steps():
    tree, roles = model(4), {"layers": "layers | h", "qkv": "self_attn.{q,k,v}_proj | c_attn", "norms": ":*Norm"}
    assert layers(tree, "layers[-2:].**.q_proj") == [2, 3]
    assert paths(tree, "@layers[-1].@qkv", **roles) == [f"model.layers.3.self_attn.{n}_proj" for n in "qkv"]
    assert paths(tree, "@layers[-1].**.@qkv", **roles) == paths(tree, "@layers[-1].@qkv", **roles)
    assert paths(tree, "@layers[0].@norms", **roles) == ["model.layers.0.norm"]
    assert paths(tree, "@norms", **roles) == paths(tree, ":*Norm")
    assert paths(tree, "@head", head="^lm_head") == ["lm_head"]
    assert paths(tree, "@head.weight", head="^lm_head") == ["lm_head.weight"]
    assert paths(tree, "@nested[0].norm", nested="@layers", layers="layers") == ["model.layers.0.norm"]
    assert paths(tree, "@r", r=r"/lm_.*/") == ["lm_head"]
    assert paths(tree, "@r:Linear", r=r"/lm_.*|model/") == ["lm_head"]
    assert paths(tree, "@root", root="^") == [""]
    assert paths(tree, "@linear:Linear", linear="lm_head | norm") == ["lm_head"]


@pytest.mark.parametrize(
    "text, roles, code",
    [
        ("@a", {"a": "@b", "b": "@a"}, "GP230"),
        ("@a", {"a": "x.@a"}, "GP230"),
        ("model.@head", {"head": "^lm_head"}, "GP231"),
        ("@lin.weight", {"lin": "lm_head:Linear"}, "GP232"),
        ("@lin[0]", {"lin": "lm_head:Linear"}, "GP233"),
        ("@some[0]", {"some": "layers[0]"}, "GP233"),
        ("@some[0]", {"some": "a.**"}, "GP233"),
        ("@r.x", {"r": "/a/"}, "GP233"),
        ("layers[i in *].x[i in *]", {}, "GP236"),
        ("{a,b}{a,b}{a,b}{a,b}{a,b}{a,b}{a,b}{a,b}{a,b}{a,b}{a,b}{a,b}{a,b}", {}, "GP234"),
        (".".join(["@x"] * 13), {"x": "a | b"}, "GP234"),
        ("@missing", {}, "GP204"),
    ],
)
def test_what_a_role_or_an_index_cannot_be(text, roles, code):
    with pytest.raises(Error) as error:
        compiled(text, **roles)
    assert error.value.code == code


def test_a_slice_that_a_param_gives_step_0_is_refused():
    zero = Index(spans=(Range(step=Literal_(value=0)),))
    union = SelectorUnion(branches=(PathSelector(steps=(Step(name="layers", index=zero),)),))
    with pytest.raises(Error) as error:
        compile_selector(union, Roles())
    assert error.value.code == "GP235"


# ── indices out of range, stacks, captures ──


def test_a_single_index_out_of_range_is_told_and_a_range_clips():
    tree = model(8)
    (bad,) = hits(tree, "layers[8].norm").out_of_range
    assert bad.asked == 8 and "`model.layers` has 8, 0 to 7" in bad.text and "layers[8]" in bad.text
    assert [b.asked for b in hits(tree, "layers[1,-9,30:].norm").out_of_range] == [-9]
    assert hits(tree, "layers[7,-8,6:99].norm").out_of_range == []
    assert hits(tree, "layer[99]").out_of_range == []
    assert [b.asked for b in hits(tree, "@layers[99].norm", layers="layers|h").out_of_range] == [99]


def towers() -> Tree:
    return grow(
        {"children": {"text": {"children": {"layers": stack(4)}}, "vision": {"children": {"layers": stack(3)}}}}
    )


def spread(tree: Tree, text: str, **roles: str) -> list[list[tuple[str, int, int]]]:
    union = compiled(text, **roles)
    (found,) = match(tree, [union])
    return [list(map(tuple, s.containers)) for s in stacks(tree, union, [*found.nodes, *found.parameters])]


def test_an_index_counts_in_each_stack_and_the_stacks_are_told():
    tree = towers()
    assert paths(tree, "layers[-1].norm") == ["text.layers.3.norm", "vision.layers.2.norm"]
    both = [[("text.layers", 2, 4), ("vision.layers", 2, 3)]]
    assert spread(tree, "layers[-2:].**.q_proj") == both
    assert spread(tree, "@layers[-2:].norm.weight", layers="layers | h") == both
    assert spread(tree, "^text.layers[-2:].norm") == []
    assert spread(tree, "{text,vision}.layers[0].norm") == []  # named one by one
    assert spread(tree, "^text.layers[0].norm | ^vision.layers[0].norm") == []
    assert spread(tree, "*.layers[0].norm") == [[("text.layers", 1, 4), ("vision.layers", 1, 3)]]
    # An index may be in the range of one stack alone.
    assert spread(tree, "layers[3].norm") == [] and hits(tree, "layers[3].norm").out_of_range == []
    assert [b.asked for b in hits(tree, "layers[4].norm").out_of_range] == [4]


def test_containers_that_differ_in_indices_are_one_stack():
    moe = {"children": {"experts": {"children": {str(at): PROJ for at in range(3)}}}}
    tree = grow({"children": {"layers": {"children": {str(at): moe for at in range(4)}}}})
    assert spread(tree, "layers[*].experts[0]") == []
    assert spread(tree, "experts[0]") == []


def test_captures_bind_the_index():
    moe = {"children": {"experts": {"children": {str(at): PROJ for at in range(3)}}}}
    tree = grow({"children": {"layers": {"children": {str(at): moe for at in range(4)}}}})
    union = compiled("layers[i in 1:].experts[j in *]")
    assert union.captures == {"i", "j"}
    (found,) = match(tree, [union])
    said = {tree.paths[n]: found.bindings(n) for n in found.nodes}
    assert said["layers.2.experts.1"] == {"i": 2, "j": 1} and len(said) == 9
    weights = hits(tree, "layers[i in *].**.weight")
    assert {weights.bindings(p)["i"] for p in weights.parameters} == {0, 1, 2, 3}
    assert compiled("layers[i in *] | norm").captures == frozenset()
    assert compiled("layers[i in *] | h[i in 0:2]").captures == {"i"}


def test_a_capture_is_that_of_the_branch_and_the_outermost_place():
    nested = {"children": {"x": {"children": {"1": {"children": {"x": {"children": {"2": PROJ}}}}}}}}
    tree = grow(nested)
    (found,) = match(tree, [compiled("x[i in *].**:Linear")])
    assert [found.bindings(n) for n in found.nodes] == [{"i": 1}]
    (found,) = match(tree, [compiled("x[i in 2:].**:Linear")])
    assert [found.bindings(n) for n in found.nodes] == [{"i": 2}]


def test_a_capture_of_a_tied_module_is_that_of_the_path_that_matches():
    tree = grow({"children": {"a": {"children": {"0": PROJ}}, "b": {"children": {"7": {}}}}}, [(2, 3, "5")])
    (found,) = match(tree, [compiled("b[i in :6]")])
    assert [(tree.paths[n], found.bindings(n)) for n in found.nodes] == [("a.0", {"i": 5})]


# ── rules that act on the new tree ──


def test_added_parameters_are_matched_like_others():
    tree = model(3)
    node = tree.find("model.layers.1.self_attn.q_proj")
    added = {node: ("lora_A", "lora_B"), 0: ("scale",)}
    texts = ["lora_*", "layers[1].**.lora_A", "layers[0].**.lora_A", "**:Parameter", r"/.*lora_B/:Parameter", "^scale"]
    found = match(tree, [compiled(t) for t in texts], added)
    assert found[0].parameters == [(node, "lora_A"), (node, "lora_B")]
    assert found[1].parameters == [(node, "lora_A")]
    assert found[2].parameters == []
    assert {(node, "lora_A"), (node, "lora_B"), (node, "weight"), (0, "scale")} <= set(found[3].parameters)
    assert found[4].parameters == [(node, "lora_B")]
    assert found[5].parameters == [(0, "scale")]


def test_a_glob_with_many_stars_takes_no_time():
    name = "a" * 400 + "b"
    assert not glob_regex("*a" * 40 + "*c").fullmatch(name)  # would not come back, were it to backtrack
    assert glob_regex("*a" * 40 + "*?").fullmatch(name)


@pytest.mark.parametrize("glob", ["*a*b*", "a*b", "*ab?c*", "a**c", "?*?", "*a?*?b", "*.*"])
def test_globs_are_those_of_fnmatch(glob):
    for name in ("", "a", "ab", "abc", "aabbc", "abxc", "xabyc", "axxbyyb", "a.c", "cab", "aaab"):
        assert bool(glob_regex(glob).fullmatch(name)) == fnmatchcase(name, glob), name
