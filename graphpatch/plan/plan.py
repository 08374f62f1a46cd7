"""A plan: what a rule set would do to a tree, as data. Printing it is the dry run; the patch room applies it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple, overload

from ..lang.diagnostics import Diagnostic
from ..ops.op import Op
from ..tree.compress import compress
from ..tree.tree import Parameter, Tensor, Tree

if TYPE_CHECKING:
    import torch

    from ..patch import Patch
    from .freeze import Grads
    from .refreeze import NewTree
    from .ruleset import RuleSet

FORMAT = 1
"""The version of the JSON form; raised when a reader of the old one would misread the new one."""


def patterns(allow_import: str | Sequence[str]) -> tuple[str, ...]:
    """Patterns of import paths. A single one may be a string: letter by letter, its `*` would permit everything."""
    return (allow_import,) if isinstance(allow_import, str) else tuple(allow_import)


class Change(NamedTuple):
    """One op on one node."""

    path: str
    paths: tuple[str, ...]
    """Every path of a tied module or parameter, `path` first."""
    rule: str
    """Where the rule stands: `lora.rules:5`."""
    op: str
    """The op as a rule writes it: `lora(rank=16)`."""


@dataclass(frozen=True)
class Step:
    """One op, with its arguments worked out, on nodes that share a signature."""

    op: Op
    rule: str
    label: str | None
    nodes: list[int]
    parameter: str | None
    """The parameter's name, where the targets are parameters of `nodes` and not the modules."""
    rewrite: str
    """The import path of the rewrite, from the op's table."""
    adds: Mapping[str, Tensor]
    """What each node gains."""
    before: str
    after: str
    """The class before and after, as the plan shows it."""
    represents: Mapping[str, int] = field(default_factory=dict)
    """The parameters of each node that are kept in another way, with the bytes each takes."""
    drops: tuple[str, ...] = ()
    """The parameters of each node that are there no more."""

    def targets(self) -> Sequence[int | Parameter]:
        return [(n, self.parameter) for n in self.nodes] if self.parameter else self.nodes

    @property
    def slots(self) -> frozenset[str]:
        """What it occupies on a module; two parameters of one module are two places."""
        slots = self.op.slots()
        return frozenset(f"{slot} of {self.parameter}" for slot in slots) if self.parameter else slots


@dataclass(frozen=True)
class Outcome:
    """What became of one rule: for the report, and for `explain`."""

    rule: str
    text: str
    """The op chain, or the freeze statement, in brief."""
    matched: int
    coverage: str
    """`4 x 24`: so many hits in so many groups of `expect ... per`; empty without."""
    frozen: bool | None = None
    """For freeze (True) and train (False) rules."""
    parameters: int = 0
    """For freeze and train rules: the parameters acted on, in elements."""


class Changes(Sequence[Change]):
    """One entry a patched node and op, in tree order within a rule; made when looked at."""

    def __init__(self, tree: Tree, steps: Sequence[Step]):
        self._tree, self._steps = tree, steps

    def __len__(self) -> int:
        return sum(len(step.nodes) for step in self._steps)

    @overload
    def __getitem__(self, at: int) -> Change: ...
    @overload
    def __getitem__(self, at: slice) -> list[Change]: ...
    def __getitem__(self, at: int | slice) -> Change | list[Change]:
        if isinstance(at, slice):
            return list(self)[at]
        at = at + len(self) if at < 0 else at
        for step in self._steps:
            if 0 <= at < len(step.nodes):
                return self._change(step, step.nodes[at], step.op.text())
            at -= len(step.nodes)
        raise IndexError("no such change")

    def __iter__(self) -> Iterator[Change]:
        for step in self._steps:
            op = step.op.text()
            for node in step.nodes:
                yield self._change(step, node, op)

    def _change(self, step: Step, node: int, op: str) -> Change:
        paths = (
            self._tree.all_paths(node) if step.parameter is None else self._tree.parameter_paths((node, step.parameter))
        )
        return Change(paths[0], tuple(paths), step.rule, op)

    def __repr__(self) -> str:
        return f"<{len(self)} changes>"


@dataclass(eq=False)
class Plan:
    """Rules x tree. Deterministic: the same rules, parameters and tree give the same plan, and the same JSON."""

    rules: RuleSet
    tree: Tree
    params: Mapping[str, Any]
    """The value of every param of the rule files."""
    adapter: str | None
    steps: list[Step]
    """To be applied in this order: by level, then as the rules chain them."""
    already: list[Step]
    """What the model carries from an earlier apply of the same rules."""
    outcomes: list[Outcome]
    grads: Grads | None
    """What the freeze and train rules say, None where there are none."""
    groups: Mapping[str, list[str]]
    """Optimizer parameter groups, by the label of their `train` rule: compressed parameter paths."""
    totals: Totals
    warnings: list[Diagnostic] = field(default_factory=list)
    allow_import: tuple[str, ...] = ()

    @property
    def changes(self) -> Changes:
        return Changes(self.tree, self.steps)

    @property
    def trainable(self) -> int:
        """Trainable parameters of the patched model, in elements."""
        return self.totals.trainable

    @cached_property
    def id(self) -> str:
        """The same for the same rules, parameters, adapter name and tree."""
        said = json.dumps([self.rules.to_json(), self.adapter, self.tree.fingerprint], sort_keys=True)
        return blake2b(said.encode(), digest_size=8).hexdigest()

    @cached_property
    def record(self) -> dict[str, Any]:
        """What a patched model keeps of its plan: enough to plan again, nothing of the tree."""
        return {**self._origin(), "allow_import": list(self.allow_import)}

    def _origin(self) -> dict[str, Any]:
        """What the plan was made from, the tree by its fingerprint."""
        return {
            "format": FORMAT,
            "id": self.id,
            "rules": json.loads(self.rules.to_json()),
            "params": dict(self.params),
            "adapter": self.adapter,
            "fingerprint": self.tree.fingerprint,
        }

    def apply(
        self,
        model: torch.nn.Module,
        allow_import: str | Sequence[str] = (),
        *,
        batches: Iterable[Any] | None = None,
    ) -> Patch:
        """Carry the plan out on `model`.

        `allow_import` is added to what was permitted when planning; a plan that was read from a file permits nothing.
        `batches` are for ops that start from data, as `graphpatch.apply` has it.
        Raises `ApplyError` where the model is not the one planned for (with the difference) or cannot be changed;
        nothing is changed then.
        """
        # The one door to a lower room: the room that mutates is opened only when something is to be mutated.
        return import_module("graphpatch.patch.apply").apply_plan(self, model, patterns(allow_import), batches=batches)

    def refreeze(self, model: torch.nn.Module, before: Iterable[torch.nn.Parameter] = ()) -> NewTree | None:
        """The freeze and train rules again, on the patched model as it stands: modules that an op brought in are ones
        that no plan can know. `before` are the parameters that the model had. None where the rules have no freeze or
        train."""
        from .refreeze import refreeze

        return refreeze(self, model, before)

    # ── reading and writing ──
    def to_json(self) -> str:
        """The plan as JSON: rules, parameters, the tree, the resolved changes. `from_json` gives the same plan back."""
        body = {
            **self._origin(),
            "tree": self.tree.to_text().splitlines(),
            "changes": [self._step_json(step) for step in self.steps],
            "already": [self._step_json(step) for step in self.already],
            "optimizer_groups": {name: list(paths) for name, paths in self.groups.items()},
            "totals": self.totals._asdict(),
            "warnings": [w.to_json() for w in self.warnings],
        }
        return json.dumps(body, indent=1)

    def _step_json(self, step: Step) -> dict[str, Any]:
        parameters = [(n, step.parameter) for n in step.nodes] if step.parameter else []
        return {
            "rule": step.rule,
            "label": step.label,
            "op": step.op.op,
            "arguments": step.op.arguments(),
            "paths": compress(self.tree, [] if step.parameter else step.nodes, parameters),
            "count": len(step.nodes),
            "symbol": step.op.symbol,
            "before": step.before,
            "after": step.after,
            "adds": {name: [list(t.shape), t.dtype] for name, t in step.adds.items()},
        }

    @classmethod
    def from_json(cls, text: str | bytes) -> Plan:
        """A saved plan. It is worked out anew from the rules and the tree it holds; raises `PlanError` where the
        result is not what was saved (an op that means something else by now, an edited file)."""
        from .saved import plan_from_json

        return plan_from_json(text)

    def __str__(self) -> str:
        from .report import plan_text

        return plan_text(self)

    def __repr__(self) -> str:
        what = f"{len(self.changes)} changes, {self.trainable} trainable"
        return f"<Plan of {self.rules.name} for {self.tree.title}: {what}>"


class Totals(NamedTuple):
    """The sums of a plan, in elements unless said otherwise."""

    rewritten: int
    """Modules and parameters rewritten in place."""
    replaced: int
    added_modules: int
    parameters_before: int
    parameters_added: int
    bytes_added: int
    trainable: int
    keys_added: int
    keys_moved: int
    """State-dict keys that stand elsewhere afterwards, or may: those below a replaced or wrapped module."""
    bytes_quantised: int = 0
    """Of the weights that are kept in fewer bits: what they take then, and before."""
    bytes_dense: int = 0
    bytes_kept: int = 0
    """Of those before, what stays in memory beside."""
    parameters_dropped: int = 0
    keys_dropped: int = 0

    @property
    def parameters_after(self) -> int:
        return self.parameters_before + self.parameters_added - self.parameters_dropped

    @property
    def share(self) -> float:
        """The trainable part of all parameters, 0 to 1."""
        return self.trainable / self.parameters_after if self.parameters_after else 0.0
