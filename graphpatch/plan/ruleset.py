"""A rule set: parsed rule files with the values given to their params, ready to be planned against any model."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

from ..lang.program import Program, load_program, parse_program
from ..tree.collection import no_collection
from ..tree.tree import Tree

if TYPE_CHECKING:
    import torch

    from .plan import Plan


class RuleSet:
    """Rule files, resolved: what they `use` included, the values of params beside them. Never changed once made."""

    def __init__(self, program: Program):
        self.program = program

    @property
    def name(self) -> str:
        """The name of the first file."""
        return self.program.files[0].name

    def plan(
        self,
        model_or_tree: torch.nn.Module | Tree,
        *,
        adapter: str | None = None,
        allow_import: str | Sequence[str] = (),
    ) -> Plan:
        """What these rules would do to a model or a `Tree`. Changes nothing.

        `adapter` names the adapter that adapter ops without a name of their own add. `allow_import` are patterns of
        import paths (`"mypkg.*"`) that `replace` and `wrap` may import when the plan is applied.

        Raises `RuleError` (unknown op, wrong argument) or `PlanError` (dead selector, uneven coverage, conflict ...),
        with everything that was found.
        """
        from .planner import make_plan

        with no_collection():
            tree = model_or_tree if isinstance(model_or_tree, Tree) else Tree.of(model_or_tree)
            return make_plan(self, tree, adapter, allow_import)

    def to_json(self) -> str:
        """JSON of the same models the parser makes, with the text of each file."""
        return self.program.model_dump_json()

    @classmethod
    def from_json(cls, text: str | bytes) -> RuleSet:
        """The inverse of `to_json`; raises `RuleError` where the text is no rule set."""
        return cls(Program.from_json(text))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RuleSet) and other.program == self.program

    def __hash__(self) -> int:
        return hash(self.to_json())

    def __repr__(self) -> str:
        given = "".join(f", {k}={v!r}" for k, v in self.program.params.items())
        return f"<RuleSet {self.name}{given}>"


def load(name_or_path: str | PathLike[str], /, **params: Any) -> RuleSet:
    """The rules of a file, or of a packaged name (`"lora"`), with values for its params.

    Raises `RuleError` with everything that is wrong in the file and in those it uses.
    """
    return RuleSet(load_program(name_or_path, params, complete=False))


def parse(text: str, /, **params: Any) -> RuleSet:
    """The rules of a text. `use` finds packaged names and absolute paths. Raises as `load` does."""
    return RuleSet(parse_program(text, params, complete=False))
