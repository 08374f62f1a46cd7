"""`layers.repeat`, against models that were built with those layers by hand."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import graphpatch

from ..patch.common import patch, refused, state
from .test_layers_drop import IDS, kinds_of, made

SOURCES = [0, 1, 2, 1, 2, 3]
RULE = "use roles\npatch @layers with layers.repeat(order=[[0, 3], [1, 4]]{})"


def deeper(model, kind):
    """Of six layers, with the weights of these."""
    options = {"layer_types": [kinds_of(model)[i] for i in SOURCES]} if kind in ("gemma2", "gpt_neo") else {}
    other = made(kind, len(SOURCES), **options)
    theirs, ours = other.state_dict(), model.state_dict()
    for key in theirs:
        parts = key.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        source = key if at is None else ".".join((*parts[:at], str(SOURCES[int(parts[at])]), *parts[at + 1 :]))
        theirs[key] = ours[source].clone()
    other.load_state_dict(theirs)
    return other


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "gpt_neo", "bert"])
def test_as_built_by_hand(kind, share, tmp_path):
    model = made(kind, 4)
    original, before, other = copy.deepcopy(model), state(model), deeper(model, kind)
    repeated = patch(model, RULE.format(", share=true" if share else ""))
    assert model.config.num_hidden_layers == 6 and set(model.state_dict()) == set(other.state_dict())
    ours, theirs = model(IDS, labels=IDS), other(IDS, labels=IDS)
    assert torch.equal(ours.logits, theirs.logits)
    ours.loss.backward()
    theirs.loss.backward()
    wanted = {name: p.grad for name, p in other.named_parameters()}
    if not share:
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, wanted[name])
    else:
        number = sum(p.numel() for p in original.parameters())
        assert sum(p.numel() for p in model.parameters()) == number and not repeated.adapter_state_dict()
        name = next(n for n in wanted if ".1." in n)
        twice = wanted[name] + wanted[name.replace(".1.", ".3.")]
        torch.testing.assert_close(model.get_parameter(name).grad, twice)
    if kind != "bert":
        generation = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(model.generate(IDS, **generation), other.generate(IDS, **generation))
    for each in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(each(IDS).logits, theirs.logits)
    if kind == "llama" and not share:
        graphpatch.save_adapter(repeated, tmp_path / "a")
        graphpatch.load_adapter(original, tmp_path / "a")
        assert torch.equal(original(IDS).logits, theirs.logits)
        lora = patch(model, "use roles\npatch @layers[*].**.q_proj with lora(rank=2)")
        lora.revert()
    model.zero_grad()
    with repeated.disabled():
        assert model.config.num_hidden_layers == 4
    repeated.revert()
    assert state(model) == before and model.config.num_hidden_layers == 4


def test_containers_of_any_model_and_refusals():
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    model, x = nn.ModuleDict({"layers": net}), torch.randn(2, 4)
    wanted = net[2](net[1](net[2](x)))
    repeated = patch(model, "patch layers with layers.repeat([[2, 3], [1, 3]])")
    assert torch.equal(model["layers"](x), wanted)
    repeated.revert()
    assert model["layers"] is net
    refused("GP581", model, "patch layers with layers.repeat([[0, 4]])")
    refused("GP581", model, "patch layers with layers.repeat([[0, 3]])")
    refused("GP410", model, "patch layers with layers.repeat([[2, 2]])")
    refused("GP204", model, "patch layers with layers.repeat([])")
    refused("GP204", model, "patch layers with layers.repeat([[1]])")
    refused("GP204", model, "patch layers with layers.repeat([[-1, 2]])")
    with torch.device("meta"):
        meta = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(4, 4) for _ in range(3))})
    patch(meta, "patch layers with layers.repeat([[0, 2], [1, 3]])")
    assert len(meta["layers"]) == 4 and all(p.is_meta for p in meta.parameters())
    patch(model, "patch layers[0] with lora(rank=2)")
    refused("GP581", model, "patch layers with layers.repeat([[0, 3], [0, 3]])")
