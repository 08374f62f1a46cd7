"""What a rule reaches, and what is said where it reaches less than it seems to."""

from __future__ import annotations

import pytest
import torch

import graphpatch
from tests.toys import lm, meta_lm


@pytest.fixture(scope="module")
def tree():
    return graphpatch.Tree.of(meta_lm(layers=24))


def paths(text: str, tree, **params) -> list[str]:
    return [change.path for change in graphpatch.parse(text, **params).plan(tree).changes]


def refusal(text: str, tree, **params) -> graphpatch.Error:
    with pytest.raises(graphpatch.PlanError) as caught:
        graphpatch.parse(text, **params).plan(tree)
    return caught.value


def test_an_index_is_a_number_and_never_text(tree):
    assert paths("patch layers[1].self_attn.q_proj with lora(rank=2)", tree) == ["model.layers.1.self_attn.q_proj"]
    assert paths("patch layers.1.self_attn.q_proj with lora(rank=2)", tree) == ["model.layers.1.self_attn.q_proj"]


@pytest.mark.parametrize(
    "index, wanted",
    [
        ("[:2]", [0, 1]),
        ("[-2:]", [22, 23]),
        ("[::8]", [0, 8, 16]),
        ("[0,5,9:11]", [0, 5, 9, 10]),
        ("[-1]", [23]),
        ("[::-12]", [11, 23]),
        ("[20:99]", [20, 21, 22, 23]),
        ("[-$n:]", [21, 22, 23]),
        ("[i in 22:]", [22, 23]),
    ],
)
def test_slices_are_pythons(tree, index, wanted):
    found = paths(f"param n: int = 3\npatch layers{index}.mlp.up_proj with lora(rank=2)", tree)
    assert found == [f"model.layers.{i}.mlp.up_proj" for i in wanted]


def test_a_single_index_out_of_range_is_an_error(tree):
    error = refusal("patch layers[24].mlp.up_proj with lora(rank=2)", tree)
    assert error.code == "GP404" and "24" in str(error)


def test_a_typo_in_one_of_four_names_is_named(tree):
    error = refusal("patch layers[*].self_attn.{q,k,w}_proj with lora(rank=2)", tree)
    assert error.code == "GP402" and "`{w}` matches nothing" in str(error)
    assert "v_proj" in str(error) and "o_proj" in str(error)


def test_a_dead_branch_is_named(tree):
    error = refusal("patch q_proj | qq_proj with lora(rank=2)", tree)
    assert error.code == "GP402" and "qq_proj" in str(error) and "did you mean" in str(error)


def test_no_match_at_all_says_how_far_it_got(tree):
    error = refusal("patch layers[*].self_attention.q_proj with lora(rank=2)", tree)
    assert error.code == "GP401" and "self_attn" in str(error)


def test_expect_any_waives_only_a_rule_that_hits_nothing(tree):
    assert paths("patch nothing with lora(rank=2) expect any", tree) == []
    assert refusal("patch {q,w}_proj with lora(rank=2) expect any", tree).code == "GP402"


def test_uneven_coverage_names_the_layers_and_what_they_have():
    tree = graphpatch.Tree.of(meta_lm(layers=30, value=lambda i: i % 6 != 5))
    error = refusal("patch layers[*].self_attn.{q,k,v,o}_proj with lora(rank=2) expect 4 per layers[*]", tree)
    assert error.code == "GP405"
    assert "expected 4 per layers[*], found 3 in 5 of 30" in str(error)
    assert "[5:30:6]" in str(error) or "[5,11,17,23,29]" in str(error)
    assert "v_proj" in str(error) and "q_proj" in str(error)


def test_an_alternative_that_hits_25_of_30_layers_passes_without_expect_and_is_counted():
    tree = graphpatch.Tree.of(meta_lm(layers=30, value=lambda i: i % 6 != 5))
    plan = graphpatch.parse("patch layers[*].self_attn.{q,v}_proj with lora(rank=2) expect >= 1 per layers[*]").plan(
        tree
    )
    assert "2 x 25 + 1 x 5" in str(plan)


def test_expect_counts(tree):
    assert len(paths("patch q_proj with lora(rank=2) expect 24", tree)) == 24
    assert refusal("patch q_proj with lora(rank=2) expect 23", tree).code == "GP405"
    assert len(paths("patch q_proj with lora(rank=2) expect >= 20", tree)) == 24
    assert refusal("patch q_proj with lora(rank=2) expect 1 per missing", tree).code == "GP411"


def test_a_hit_outside_every_group_is_an_error(tree):
    error = refusal("patch :Linear with lora(rank=2) expect 6 per layers[*]", tree)
    assert error.code == "GP413" and "lm_head" in str(error)


def test_a_hit_counts_in_the_group_it_is(tree):
    assert len(paths("patch mlp.up_proj with lora(rank=2) expect 1 per mlp.up_proj", tree)) == 24


def test_except_covers_the_whole_subtree_and_filters_groups(tree):
    text = "patch layers[*].**:Linear with lora(rank=2) except layers[3:] expect 6 per layers[*]"
    assert len(paths(text, tree)) == 18


def test_a_literal_except_must_remove_something(tree):
    error = refusal("patch q_proj with lora(rank=2) except vision", tree)
    assert error.code == "GP409"
    assert refusal("patch q_proj with lora(rank=2) except mlp", tree).code == "GP409"
    assert refusal("patch q_proj with lora(rank=2) except layers[0] | vision", tree).code == "GP409"


def test_a_role_in_except_need_not(tree):
    assert len(paths("use roles\npatch q_proj with lora(rank=2) except @tower", tree)) == 24


def test_all_excluded_is_told_apart_from_absent(tree):
    error = refusal("patch q_proj with lora(rank=2) except model", tree)
    assert error.code == "GP406" and "all 24 matches were excluded" in str(error)


def test_where(tree):
    assert len(paths("patch :Linear where out_features == 32 and bias is none with lora(rank=2)", tree)) == 1
    assert len(paths("patch :Linear where bias.shape[0] == 32 with lora(rank=2)", tree)) == 24
    assert refusal("patch :Linear where out_features > 999 with lora(rank=2)", tree).code == "GP403"
    error = refusal("patch :Linear where out_featurs > 9 with lora(rank=2)", tree)
    assert error.code == "GP408" and "out_features" in str(error)


def test_ordering_on_none_makes_the_whole_where_false_even_under_not(tree):
    text = "patch layers[*].** where not (eps > 1) with set(eps=1e-5) expect any"
    assert len(paths(text, tree)) == 48  # the norms alone have an eps


def test_alternatives_are_judged_after_where(tree):
    assert refusal("patch {up,down}_proj where out_features == 32 with lora(rank=2)", tree).code == "GP402"


def test_all_errors_of_a_file_come_at_once(tree):
    error = refusal("patch nope with lora(rank=2)\npatch neither with lora(rank=2)", tree)
    assert len(error.diagnostics) == 2


def test_captures_and_config_in_arguments(tree):
    plan = graphpatch.parse(
        "patch layers[i in *].mlp.up_proj with lora(rank=4 if $i < 12 else config.hidden_size)"
    ).plan(tree)
    assert {c.op for c in plan.changes} == {"lora(rank=4)", "lora(rank=16)"}
    assert [c.op for c in plan.changes if c.path == "model.layers.11.mlp.up_proj"] == ["lora(rank=4)"]


def test_a_tied_module_is_one_node_with_all_its_paths():
    model = meta_lm(layers=2)
    model.model.layers[1].mlp = model.model.layers[0].mlp
    changes = graphpatch.parse("patch layers[1].mlp.up_proj with lora(rank=2)").plan(model).changes
    assert [c.paths for c in changes] == [("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj")]
    assert len(graphpatch.parse("patch up_proj with lora(rank=2) expect 1").plan(model).changes) == 1
    error = refusal("patch up_proj with lora(rank=2) except layers[1]", graphpatch.Tree.of(model))
    assert error.code == "GP406"


@pytest.mark.parametrize(
    "rule", ["patch q_proj with lora except layers[0,99]", "patch q_proj with lora expect 1 per layers[0:24,99]"]
)
def test_an_index_out_of_range_is_an_error_in_every_selector(tree, rule):
    error = refusal(rule, tree)
    assert error.code == "GP404" and "`layers[99]` is out of range" in str(error)


def test_an_alternative_of_per_that_matches_nothing_is_an_error(tree):
    error = refusal("patch {q,k}_proj with lora expect >= 2 per {self_attn,atention}", tree)
    assert error.code == "GP402" and "`{atention}` matches nothing" in str(error)
    error = refusal("patch q_proj with lora expect 1 per layer", tree)
    assert error.code == "GP411" and "did you mean `layers`?" in str(error)


def test_an_unknown_attribute_is_said_once(tree):
    error = refusal("patch q_proj with lora where infeatures > 5", tree)
    assert [d.code for d in error.diagnostics] == ["GP408"]


def test_what_only_parameters_have_is_said_to_be_of_parameters(tree):
    error = refusal("freeze self_attn.** where ndim == 1", tree)
    assert "weight.ndim" in str(error) and ":Parameter" in str(error)
    assert graphpatch.parse("freeze weight where ndim == 1").plan(tree).outcomes[0].matched == 49


def test_a_regex_over_parameters_names_the_way_to_them(tree):
    error = refusal(r"freeze /.*norm\.weight/", tree)
    assert "end it in `/:Parameter`" in str(error)


def test_a_count_that_is_no_integer_is_called_a_count(tree):
    assert "what `expect` counts must be an integer" in str(refusal("patch q_proj with lora expect 24.0", tree))


def test_the_root_is_named_where_an_op_refuses_it(tree):
    assert "`^` cannot take lora" in str(refusal("patch ^ with lora", tree))


def test_a_param_that_nobody_uses_may_mean_nothing_here(tree):
    rules = graphpatch.parse("param a: int = config.zzz\nparam b: int = 2\npatch q_proj with lora(rank=$b)")
    assert rules.plan(tree).params == {"b": 2}
    text = "param a: int = config.zzz\npatch q_proj with lora(rank=$a)\npatch k_proj with lora(rank=$a)"
    assert [d.code for d in refusal(text, tree).diagnostics] == ["GP220"]


def test_a_required_param_is_asked_for_though_nobody_uses_it(tree):
    assert refusal_of_rule("param a: int\npatch q_proj with lora", tree).code == "GP215"


def refusal_of_rule(text: str, tree) -> graphpatch.Error:
    with pytest.raises(graphpatch.RuleError) as caught:
        graphpatch.parse(text).plan(tree)
    return caught.value


def test_a_module_counts_in_every_group_that_holds_one_of_its_paths():
    blocks = torch.nn.ModuleList([torch.nn.ModuleDict({"q": torch.nn.Linear(2, 2)}) for _ in range(3)])
    blocks[2]["q"] = blocks[0]["q"]
    model = torch.nn.ModuleDict({"blocks": blocks, "head": blocks[1]["q"]})
    assert paths("patch blocks[*].q with lora(rank=1) expect 1 per blocks[*]", model) == ["blocks.0.q", "blocks.1.q"]
    error = refusal("patch blocks[*].q with lora(rank=1) expect 1 per blocks[2]", model)
    assert error.code == "GP413" and "1 of 2 matches" in str(error) and "^blocks[1].q" in str(error)


def test_the_config_of_a_lightning_module_is_that_of_the_model_in_it():
    import lightning

    class Task(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = lm(layers=2)

    text = "when config.num_hidden_layers == 2 { patch q_proj with lora(rank=config.num_hidden_layers) }"
    assert len(paths(text, Task())) == 2
