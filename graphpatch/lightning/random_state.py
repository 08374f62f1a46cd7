"""The random state of every rank, saved, and restored at the moment that makes a resumed run the one that stopped."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed, nn

_NAME = "_graphpatch_randomness"


@dataclass
class Randomness:
    """What a checkpoint told, until it is used.

    Saved at the last batch of an epoch, the state is needed before the next epoch's loader is made, and so set while
    loading. Saved within one, it must be set at the first batch, after the loader was made and the sanity check run.
    """

    waiting: dict[str, Any] | None = None
    at_end: bool = False

    @classmethod
    def of(cls, module: nn.Module) -> Randomness:
        found = module.__dict__.get(_NAME)
        if found is None:
            found = module.__dict__[_NAME] = cls()
        return found

    @staticmethod
    def gathered(at_end: bool) -> dict[str, Any]:
        """The states of all ranks; every rank calls this when it saves. `at_end`: the epoch's last batch is done."""
        mine = current()
        states = [mine]
        if distributed.is_available() and distributed.is_initialized():
            states = [{} for _ in range(distributed.get_world_size())]
            distributed.all_gather_object(states, mine)
        return {"states": states, "at_end": at_end}

    def read(self, said: dict[str, Any] | None) -> None:
        if not said:
            return
        rank = distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0
        states = said["states"]
        self.waiting = states[rank] if rank < len(states) else None
        if said.get("at_end") and self.waiting is not None:
            put(self.waiting)
            self.waiting = None

    def restore_mid_epoch(self) -> None:
        if self.waiting is not None:
            put(self.waiting)
            self.waiting = None


def current() -> dict[str, Any]:
    """Of python, numpy, torch and its devices; of types that torch loads with weights_only."""
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    try:
        import numpy
    except ImportError:
        return state
    kind, keys, *rest = numpy.random.get_state()
    state["numpy"] = [str(kind), [int(k) for k in keys], *rest]
    return state


def put(state: dict[str, Any]) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
    if "numpy" in state:
        import numpy

        kind, keys, *rest = state["numpy"]
        numpy.random.set_state((kind, numpy.array(keys, dtype=numpy.uint32), *rest))
