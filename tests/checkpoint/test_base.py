"""An adapter fits its base, whatever its dtype, and no other model."""

from __future__ import annotations

import json
import logging
import warnings

import pytest
import torch
from torch import nn

import graphpatch
from tests.checkpoint.common import IDS, LORA, NORMS, edit, refused, saved, trained
from tests.toys import RMSNorm, lm


@pytest.fixture
def folder(tmp_path):
    return saved(tmp_path / "adapter")[0]


def test_another_width_is_shown_compressed(folder):
    text = refused("GP611", lm(hidden=32), folder)
    assert "~ ^model.layers[0:4].self_attn.{q,k,v,o}_proj           Linear(16, 16) -> Linear(32, 32)" in text
    assert "0 of its 50 tensors have no place here, 50 of those that have differ" in text
    assert "LM, fingerprint " in text


def test_fewer_layers_leave_tensors_without_a_place(folder):
    text = refused("GP611", lm(layers=3), folder)
    assert "12 of its 50 tensors have no place here, 0 of those" in text
    assert "first without a place: model.layers.3.self_attn.q_proj.lora_A" in text


def test_more_layers_and_other_ties_are_another_base_too(folder):
    assert "+ ^model.layers[4]" in refused("GP611", lm(layers=5), folder)
    assert "lm_head.weight is now tied to model.embed_tokens.weight" in refused("GP611", lm(tied=True), folder)


def test_another_class_with_the_same_shapes_is_another_base(folder):
    model = lm()
    model.model.norm = nn.RMSNorm(16)
    assert model.model.norm.weight.shape == (16,)
    graphpatch.load_adapter(model, folder).revert()  # the same name, from torch: taken for the same

    model.model.norm = nn.PReLU(16)
    assert "RMSNorm(16) -> PReLU(16)" in refused("GP611", model, folder)


class FastNorm(RMSNorm):
    """What a kernel library puts in the place of a class."""


class Linear4bit(nn.Linear):
    """Packed as bitsandbytes packs it: two weights a byte, in a column."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        self.weight = nn.Parameter(torch.zeros(linear.weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False)


def test_a_derived_class_and_a_packed_weight_are_of_the_same_base(folder):
    model = lm()
    model.model.norm.__class__ = FastNorm
    model.model.layers[0].mlp.up_proj = Linear4bit(model.model.layers[0].mlp.up_proj)
    patch = graphpatch.load_adapter(model, folder)
    assert len(patch.adapter_state_dict()) == 50
    patch.revert()
    model.model.layers[0].mlp.up_proj = Linear4bit(nn.Linear(16, 64))
    assert "Linear(16, 32) -> Linear4bit(16, 64)" in refused("GP611", model, folder)


def test_modules_without_weights_and_buffers_may_come_and_go(folder):
    model = lm()
    model.model.act = nn.GELU()
    model.model.register_buffer("position_ids", torch.arange(4))
    del model.model.layers[0].mlp.dropout
    model.model.layers[0].mlp.dropout = nn.Identity()
    assert graphpatch.load_adapter(model, folder).changes


def test_numbers_that_weights_do_not_show_are_warned_of(folder):
    model = lm()
    model.model.norm.eps = 0.1
    with pytest.warns(UserWarning, match=r"GP612(.|\n)*\^model\.norm   RMSNorm\(16\)   eps: 1e-06 -> 0\.1"):
        graphpatch.load_adapter(model, folder)


def test_dropout_and_dtype_are_only_noted(folder, caplog):
    model = lm().bfloat16()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with warnings.catch_warnings(), caplog.at_level(logging.INFO, "graphpatch"):
        warnings.simplefilter("error")
        graphpatch.load_adapter(model, folder)
    assert "weight: float32[16, 16] -> bfloat16[16, 16]" in caplog.text and "p: 0.1 -> 0.0" in caplog.text


def test_the_bytes_of_the_base_are_compared_if_that_was_asked_for(tmp_path):
    model = lm()
    graphpatch.save_adapter(trained(model, NORMS), tmp_path, hash_base=True)
    graphpatch.load_adapter(lm(), tmp_path)  # the norms trained, and count for nothing
    other = lm()
    other.lm_head.weight.data[0, 0] += 1
    assert "a base with other weights" in refused("GP618", other, tmp_path)
    graphpatch.load_adapter(lm().bfloat16(), tmp_path)  # other bytes by nature


# ── the rules ──


def test_edited_rules_are_not_what_was_saved(folder):
    def other_rank(body):
        text = LORA.replace("rank=4", "rank=2")
        body["rules"] = json.loads(graphpatch.parse(text).to_json())

    edit(folder, other_rank)
    text = refused("GP613", lm(), folder)
    assert "of 3 changes 3 are gone, and 3 are new" in text and "+ lora(rank=2, " in text


def test_rules_whose_text_alone_was_edited_are_no_rules(folder):
    edit(folder, lambda body: body["rules"]["files"][0].update(text=LORA.replace("rank=4", "rank=2")))
    assert "its rules cannot be read" in refused("GP602", lm(), folder)


def test_paths_may_have_been_compressed_otherwise(folder):
    def spelt(body):
        change = next(c for c in body["changes"] if c["paths"] == ["^model.layers[0:4].mlp.down_proj"])
        change["paths"] = ["^model.layers[2:4].mlp.down_proj", "^model.layers[0,1].mlp.down_proj"]

    edit(folder, spelt)
    assert graphpatch.load_adapter(lm(), folder).changes
    edit(folder, lambda body: body["changes"][0].update(paths=["(("]))
    refused("GP613", lm(), folder)


def test_an_argument_that_an_op_has_got_since_does_not_count(folder):
    edit(folder, lambda body: [change["arguments"].pop("use_rslora") for change in body["changes"]])
    assert graphpatch.load_adapter(lm(), folder).changes
    edit(folder, lambda body: [change["arguments"].update(use_rslora=True) for change in body["changes"]])
    refused("GP613", lm(), folder)


def test_params_are_those_it_was_saved_with(tmp_path):
    model = lm().eval()
    rules = graphpatch.parse("param rank: int\n" + LORA.replace("rank=4", "rank=$rank"), rank=3)
    graphpatch.save_adapter(graphpatch.apply(model, rules), tmp_path)
    patch = graphpatch.load_adapter(lm(), tmp_path)
    assert patch.adapter_state_dict()["lm_head.lora_A"].shape == (3, 16)
    assert torch.equal(patch.model.eval()(IDS), model(IDS))
