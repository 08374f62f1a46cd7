"""What a megatron-core config or layer does itself is not done again by a rule, nor behind its back."""

from __future__ import annotations

import copy
import os
from dataclasses import make_dataclass
from typing import Any

import pytest
import torch
from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch import nn

import graphpatch

from .models import gpt
from .pool import one, ranks
from .training import chunks_of

ATTENTION = "patch core_attention with "


def told(rules: str, said: dict[str, Any], moved: bool) -> tuple[str, bool, bool]:
    """What applying says, of a model whose config says something more; whether the model is what it was, and whether
    it is taken when its config no longer says so."""
    model = gpt()
    # Fields that later releases have.
    fields = [(name, Any, None) for name in said]
    model.config.__class__ = make_dataclass("TransformerConfig", fields, bases=(type(model.config),))
    for name, value in said.items():
        setattr(model.config, name, value)
    if moved:
        for layer in model.decoder.layers:
            core = layer.self_attention.core_attention
            core.__class__ = type("TEDotProductAttention", (DotProductAttention,), {"__module__": EXTENSIONS})
    classes = [type(module) for module in model.modules()]
    before = copy.deepcopy(dict(model.named_parameters()))
    with pytest.raises(graphpatch.Error) as raised:
        graphpatch.apply(model, graphpatch.parse(rules))
    after = dict(model.named_parameters())
    same = classes == [type(module) for module in model.modules()] and before.keys() == after.keys()
    same = same and all(torch.equal(before[key], after[key]) for key in before)
    fresh = gpt()
    patch = graphpatch.apply(fresh, graphpatch.parse(rules))
    return str(raised.value), same, bool(patch)


EXTENSIONS = "megatron.core.extensions.transformer_engine"


@pytest.mark.parametrize(
    ("code", "rules", "said", "moved"),
    [
        ("GP465", ATTENTION + "softcap.attention(5.0)", {"attn_logit_softcapping": 30.0}, False),
        ("GP951", ATTENTION + "attention.scale(0.5)", {"use_mup": True}, False),
        ("GP951", "patch embedding with scale.output(8.0)", {"use_mup": True}, False),
        ("GP951", "patch output_layer with softcap.output(30.0)", {"use_mup": True}, False),
        ("GP951", ATTENTION + "softcap.attention(5.0)", {"gtp_weight_size": 2}, False),
        ("GP950", ATTENTION + "softcap.attention(5.0)", {}, True),
    ],
)
def test_it_is_refused_and_nothing_has_changed(code, rules, said, moved):
    text, same, taken = one(told, rules, said, moved)
    assert code in text and same and taken


class Halved(nn.Module):
    """Halves what a linear puts out, and says nothing of shards."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output, bias = self.inner(*args, **kwargs)
        return output / 2, bias


class Sharded(Halved):
    """The same, and does."""

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        return self.inner.sharded_state_dict(f"{prefix}inner.", sharded_offsets, metadata)  # type: ignore[operator]


def wrapped(cls: str, target: str) -> tuple[str, bool]:
    (chunk,) = chunks_of()
    before = list(chunk.state_dict())
    rules = graphpatch.parse(f'patch ^decoder.layers[1].**.{target} with wrap(class="{__name__}.{cls}")')
    try:
        graphpatch.apply(chunk, rules, allow_import="tests.*")
    except graphpatch.Error as error:
        return error.code, list(chunk.state_dict()) == before
    return "", list(chunk.state_dict()) == before


@pytest.mark.parametrize("target", ["linear_proj", "linear_fc1"])
def test_a_wrapper_that_would_save_shards_as_the_whole(target):
    assert ranks(wrapped, "Halved", target, tp=2) == [("GP468", True)] * 2
    assert ranks(wrapped, "Sharded", target, tp=2) == [("", False)] * 2
    assert ranks(wrapped, "Halved", target) == [("", False)]
    assert ranks(wrapped, "Halved", "input_layernorm", tp=2) == [("", False)] * 2


def filed(folder: str, whole: str) -> tuple[list[str], bool]:
    (chunk,) = chunks_of()
    patch = graphpatch.apply(chunk, graphpatch.parse("patch linear_qkv with lora(rank=2)\nfreeze ** except @new"))
    if not os.path.exists(whole):
        graphpatch.save_adapter(patch, whole, hash_base=True)
    before = [p.detach().clone() for p in chunk.parameters()]
    other = graphpatch.apply(chunks_of()[0], graphpatch.parse("patch linear_qkv with lora(rank=3)"))
    codes = []
    for act in (
        lambda: graphpatch.save_adapter(patch, folder, hash_base=True),
        lambda: graphpatch.load_adapter(chunks_of()[0], whole),
        lambda: graphpatch.load_weights(other, whole, fit=True),
        lambda: graphpatch.save_weights(patch, f"{folder}/weights"),
        lambda: graphpatch.combine(chunk, {None: 1.0}, "both").revert(),
    ):
        try:
            act()
            codes.append("")
        except graphpatch.Error as error:
            codes.append(error.code)
    return codes, all(map(torch.equal, before, chunk.parameters()))


@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 2}], ids=str)
def test_what_needs_the_whole_model_on_one_process(tmp_path, layout):
    assert one(filed, str(tmp_path / "whole"), str(tmp_path / "whole"))[0] == [""] * 5
    found = ranks(filed, str(tmp_path / "part"), str(tmp_path / "whole"), **layout)
    assert found == [(["GP953"] * 5, True)] * 2 and not (tmp_path / "part").exists()
    # Each rank of data parallelism has the whole.
    assert ranks(filed, str(tmp_path / "whole"), str(tmp_path / "whole"), dp=2)[0][0] == [""] * 5


class Gained(Sharded):
    """With a parameter of its own."""

    def __init__(self, inner: nn.Module):
        super().__init__(inner)
        self.gain = nn.Parameter(torch.ones(()))


def trains(rules: str) -> list[str]:
    (chunk,) = chunks_of()
    text = f'patch ^decoder.layers[3].**.linear_proj with wrap(class="{__name__}.Gained")\n{rules}'
    graphpatch.apply(chunk, graphpatch.parse(text), allow_import="tests.*")
    return [name.rpartition(".")[2] for name, p in chunk.named_parameters() if p.requires_grad]


@pytest.mark.parametrize(("rules", "names"), [("freeze **", []), ("freeze ** except @new", ["gain"])])
def test_a_wrappers_own_parameters_train_as_the_rules_say(rules, names):
    assert one(trains, rules) == names
    assert ranks(trains, rules, pp=2) == [[], names]
