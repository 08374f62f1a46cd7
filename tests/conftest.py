"""What holds for every test."""

from __future__ import annotations

import os

import pytest

# Before torch reads it: ranks are forked from a process that has computed, and would wait for OpenMP's threads, which a
# fork does not have. `make test` says so itself.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True, scope="session")
def toys_go_the_way_of_real_models():
    """Whose inputs are not small: they are computed in one node in training."""
    from graphpatch.rewrites import low_rank

    before, low_rank.SMALL = low_rank.SMALL, 0
    yield
    low_rank.SMALL = before
