"""Medusa's heads against their formula."""

from __future__ import annotations

import copy

import torch
from torch.nn import functional as F

from ..patch.common import patch, refused, state
from .test_heads import IDS, bert, pair


def test_heads_start_as_the_language_model_head_and_have_their_losses() -> None:
    model = pair("Llama", "ForSequenceClassification")[1].eval()
    before, plain = state(model), model(IDS, labels=IDS)
    added = patch(model, "patch ^ with head.medusa(n=2)")
    assert len(added.adapter_state_dict()) == 6
    output = model(IDS, labels=IDS)
    assert output.medusa_logits.shape == (2, 4, 9, 64)
    torch.testing.assert_close(output.medusa_logits[1], plain.logits)
    with torch.no_grad():
        for p in model.medusa_head.parameters():
            p.normal_(std=0.2)
    output = model(IDS, labels=IDS)
    states = model.model(IDS).last_hidden_state
    expected = plain.loss
    for k, (block, last) in enumerate(model.medusa_head, 1):
        logits = (states + F.silu(F.linear(states, block.linear.weight, block.linear.bias))) @ last.weight.T
        torch.testing.assert_close(output.medusa_logits[k - 1], logits)
        loss = F.cross_entropy(logits[:, : -k - 1].reshape(-1, 64), IDS[:, k + 1 :].reshape(-1))
        expected = expected + 0.8**k * loss
    torch.testing.assert_close(output.loss, expected)
    output.loss.backward()
    assert all(p.grad is not None for p in model.medusa_head.parameters())
    assert torch.equal(copy.deepcopy(model)(IDS).medusa_logits, output.medusa_logits)
    added.revert()
    model.zero_grad()
    assert state(model) == before


def test_a_model_without_such_a_head_is_refused() -> None:
    assert "no language-model head" in refused("GP570", bert("BertModel"), "patch ^ with head.medusa(n=2)")
