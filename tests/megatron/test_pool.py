"""The harness itself: a rank that fails or hangs is told of, and stock models are the same at any layout."""

from __future__ import annotations

import time

import pytest
import torch

from .models import BATCH, LENGTH, VOCABULARY, gpt
from .pool import RankFailed, one, ranks


def failing() -> None:
    if torch.distributed.get_rank() == 1:
        raise ValueError("this one")
    torch.distributed.barrier()


def hanging() -> None:
    if torch.distributed.get_rank() == 1:
        time.sleep(60)


def test_a_rank_that_fails_ends_the_others():
    began = time.monotonic()
    with pytest.raises(RankFailed, match="this one"):
        ranks(failing, tp=2)
    assert time.monotonic() - began < 20


def test_a_group_that_hangs_is_told_of():
    with pytest.raises(RankFailed, match=r"ranks \[1\] of 2 did not end"):
        ranks(hanging, tp=2, timeout=2)


def logits(sequence_parallel: bool = False) -> torch.Tensor:
    ids = torch.arange(BATCH * LENGTH).reshape(BATCH, LENGTH) % VOCABULARY
    model = gpt(gather=True, sequence_parallel=sequence_parallel)
    return model(ids, torch.arange(LENGTH).expand(BATCH, LENGTH), None).detach()


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_a_stock_model_is_the_same_on_two_ranks(sequence_parallel):
    whole = one(logits)
    for part in ranks(logits, sequence_parallel, tp=2):
        torch.testing.assert_close(part, whole, rtol=0, atol=1e-5)


def test_nothing_of_cuda_is_changed_in_this_process():
    from graphpatch.megatron import cpu

    assert not cpu._enabled and torch.zeros(1).type() == "torch.FloatTensor"
