"""A DataLoader that goes on where it was, and not at the beginning of its epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader


class ResumableDataLoader(DataLoader):
    """A `DataLoader` whose place is part of a checkpoint: training resumed in mid-epoch sees the batches that are left.

    Lightning stores the state of every loader that has one. This one's is the random state that the epoch began with,
    from which the same order is drawn again, and the number of batches that were given out; those are passed over. What
    a dataset computes at random in this process (no workers) is computed again for them.
    """

    _began: torch.Tensor | None = None
    _given = 0
    _resumed: dict[str, Any] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        resumed, self._resumed = self._resumed, None
        passed = 0
        if resumed is not None and resumed["began"] is not None:
            torch.set_rng_state(resumed["began"])
            passed = resumed["given"]
        self._began, self._given = torch.get_rng_state(), 0
        for batch in super().__iter__():
            self._given += 1
            if self._given > passed:
                yield batch
        self._began, self._given = None, 0

    def state_dict(self) -> dict[str, Any]:
        # Who counts the batches asks for no further one, so the end of an epoch may never be seen here.
        if self._began is None or self._given >= len(self):
            return {"began": None, "given": 0}
        return {"began": self._began, "given": self._given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._resumed = state
