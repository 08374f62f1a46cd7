"""Adapters swapped through one patch: other ranks, scales, names and modules, and nothing compiled anew."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import graphpatch
from tests.checkpoint.common import IDS
from tests.patch.common import patch, randomise, state
from tests.toys import lm

SLOT = "patch {q,v,o}_proj with lora(rank=8, alpha=16)\nfreeze ** except @new"
OTHERS = {
    "the same": SLOT,
    "a lower rank": "patch {q,v,o}_proj with lora(rank=3, alpha=6)",
    "another scale": "patch {q,v,o}_proj with lora(rank=8, alpha=4, use_rslora=true)",
    "fewer modules": "patch v_proj | layers[1].**.q_proj with lora(rank=2, alpha=5)",
    "ranks that differ": "patch q_proj with lora(rank=1)\npatch {v,o}_proj with lora(rank=4, alpha=2)",
    "names of its own": 'patch {q,v,o}_proj with lora(rank=2, adapter="mine")',
}


def saved(folder, text: str, build=lambda: lm().eval(), **options):
    model = build()
    handle = patch(model, text, **options)
    randomise(handle)
    for p in model.parameters():
        p.requires_grad = False  # the base is not saved
    graphpatch.save_adapter(handle, folder)
    return model


def test_many_adapters_through_one_slot_of_a_compiled_model(tmp_path):
    model, counter = lm().eval(), CompileCounter()
    slot = patch(model, SLOT, adapter="slot")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        compiled(IDS)
        for name, text in OTHERS.items():
            other = saved(tmp_path / name, text, adapter="other")
            graphpatch.load_weights(slot, tmp_path / name, fit=True)
            torch.testing.assert_close(compiled(IDS), other(IDS), msg=name)
            assert not torch.allclose(other(IDS), lm().eval()(IDS))
    assert counter.frame_count == 1
    torch._dynamo.reset()


KINDS = {
    "groups": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)).eval(), 2, 6, torch.randn(2, 4, 5, 5), ""),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2)).eval(),
        2,
        6,
        torch.randn(2, 4, 5, 5),
        "",
    ),
    "embedding": (lambda: nn.Sequential(nn.Embedding(9, 4)).eval(), 2, 5, torch.arange(9), ""),
    "dora": (lambda: nn.Sequential(nn.Linear(4, 6)).eval(), 2, 3, torch.randn(2, 4), ", dora=true"),
    "bias": (lambda: nn.Sequential(nn.Linear(4, 6)).eval(), 2, 3, torch.randn(2, 4), ", bias=true"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(tmp_path, kind):
    build, rank, room, x, options = KINDS[kind]
    torch.manual_seed(0)
    base = build()
    other = saved(tmp_path / "a", f"patch ^0 with lora(rank={rank}, alpha=3{options})", lambda: deepcopy(base))
    model = deepcopy(base)
    slot = patch(model, f"patch ^0 with lora(rank={room}{options})")
    graphpatch.load_weights(slot, tmp_path / "a", fit=True)
    torch.testing.assert_close(model(x), other(x))


def attention() -> nn.Module:
    return nn.Sequential(nn.MultiheadAttention(8, 2, batch_first=True)).eval()


@pytest.mark.parametrize("parts", ["", ', parts=["q", "v"]', ', parts=["k", "out"]'])
def test_attention(tmp_path, parts):
    torch.manual_seed(0)
    base = attention()
    x = torch.randn(2, 5, 8)
    other = saved(tmp_path / "a", f"patch ^0 with lora(rank=2, alpha=3{parts})", lambda: deepcopy(base))
    model = deepcopy(base)
    slot = patch(model, f"patch ^0 with lora(rank=5{parts})")
    graphpatch.load_weights(slot, tmp_path / "a", fit=True)
    torch.testing.assert_close(model[0](x, x, x), other[0](x, x, x))
    assert not torch.allclose(model[0](x, x, x)[0], base[0](x, x, x)[0])


@pytest.mark.parametrize("fit", [True, False])
@pytest.mark.parametrize("build", [attention, lambda: nn.Sequential(nn.Linear(8, 24)).eval()], ids=["in one", "linear"])
def test_other_parts_of_the_same_shapes_are_refused(tmp_path, build, fit):
    layout = "" if type(build()[0]) is not nn.Linear else ', layout=[["q", 8], ["k", 8], ["v", 8]]'
    saved(tmp_path / "a", f'patch ^0 with lora(rank=2, parts=["q"]{layout})', build)
    slot = patch(build(), f'patch ^0 with lora(rank=2, parts=["v"]{layout})')
    before = state(slot.model)
    with pytest.raises(graphpatch.Error) as caught:
        graphpatch.load_weights(slot, tmp_path / "a", fit=fit)
    assert caught.value.code == "GP529" and 'parts=["v"]' in str(caught.value)
    assert state(slot.model) == before


REFUSED = {
    "a higher rank": ("patch q_proj with lora(rank=9)", "the rank 9, and the patch 8"),
    "other modules": ("patch q_proj | lm_head with lora(rank=2)", "`lm_head` has no place"),
    "dora": ("patch q_proj with lora(rank=2, dora=true)", "dora=true"),
    "pissa": ('patch q_proj with lora(rank=2, init="pissa")', "pissa"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_and_changes_nothing(tmp_path, case):
    text, said = REFUSED[case]
    saved(tmp_path / "a", text)
    slot = patch(lm().eval(), SLOT)
    randomise(slot)
    before = state(slot.model)
    with pytest.raises(graphpatch.Error) as caught:
        graphpatch.load_weights(slot, tmp_path / "a", fit=True)
    assert caught.value.code == "GP529" and said in str(caught.value)
    assert state(slot.model) == before


def test_without_fit_another_scale_or_rank_is_refused(tmp_path):
    slot = patch(lm().eval(), SLOT)
    before = state(slot.model)
    for text, code in {OTHERS["another scale"]: "GP529", OTHERS["a lower rank"]: "GP615"}.items():
        saved(tmp_path / code, text)
        with pytest.raises(graphpatch.Error) as caught:
            graphpatch.load_weights(slot, tmp_path / code)
        assert caught.value.code == code
    with pytest.raises(graphpatch.Error) as caught:
        graphpatch.load_weights(slot, slot.adapter_state_dict(), fit=True)
    assert caught.value.code == "GP529"
    assert state(slot.model) == before
