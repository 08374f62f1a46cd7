"""A short run of the fuzzer; CI runs `tests/fuzz.py` for longer."""

from __future__ import annotations

import random

import pytest

from tests import fuzz


@pytest.mark.parametrize("name", fuzz.TARGETS)
@pytest.mark.parametrize("seed", range(3))
def test_only_our_own_errors_come_out(name: str, seed: int) -> None:
    target, chance = fuzz.TARGETS[name], random.Random(seed)
    outcomes = [fuzz.attempt(target, fuzz.mutate(chance.choice(target.texts), target, chance)) for _ in range(60)]
    assert set(outcomes) <= {"read", "refused"} and "refused" in outcomes
