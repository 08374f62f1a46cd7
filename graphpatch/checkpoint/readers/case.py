"""What a row of the table is asked about."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property

from ...tree.tree import Tree
from .adapter import Adapter
from .effective import Reached, reach


class Case:
    """An adapter, the model it is for (None where that is not known), and what the reader was started with."""

    def __init__(self, adapter: Adapter, tree: Tree | None = None, max_rank: int | None = None):
        self.adapter, self.tree, self.max_rank = adapter, tree, max_rank

    @cached_property
    def reached(self) -> list[Reached]:
        return reach(self.adapter, self.tree) if self.tree is not None else []

    @property
    def kind(self) -> str:
        """The model's `model_type`, as far as it is known."""
        configs = self.tree.configs if self.tree is not None else []
        return next((str(c["model_type"]) for c in configs if c.get("model_type")), "")


Predicate = Callable[[Case], Iterable[str]]
"""A question to an adapter. What it gives are the witnesses against, in a few words each; none where all is well."""
