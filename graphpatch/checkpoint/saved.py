"""What a directory of `save_adapter` holds: read, found whole, and held against what its rules mean now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path

from ..lang.diagnostics import Diagnostic, Error
from ..plan.plan import Plan
from ..plan.ruleset import RuleSet
from ..tree.tree import Tree
from .base import log
from .changes import difference
from .manifest import Manifest
from .pair import JSON, read_pair
from .save import changes_of
from .tensors import Named, content_hash, refuse_names


@dataclass(frozen=True)
class Saved:
    """What a directory holds, read and found whole."""

    folder: str
    manifest: Manifest
    rules: RuleSet
    made_on: Tree
    tensors: Named

    @property
    def keys(self) -> list[str]:
        """In the order of the model's modules."""
        return [*self.manifest.tensors.added, *self.manifest.tensors.base]

    @classmethod
    def read(cls, directory: str | PathLike[str]) -> Saved:
        folder = Path(directory)
        manifest, tensors = read_pair(folder)
        path = folder / JSON
        said = dict.fromkeys([*manifest.tensors.added, *manifest.tensors.base])
        refuse_names([k for k in said if k not in tensors], [k for k in tensors if k not in said], fspath(folder))
        return cls(fspath(folder), manifest, manifest.rule_set(path), manifest.base_tree(path), tensors)

    def plan(self, tree: Tree, adapter: str | None, allow_import: Sequence[str]) -> Plan:
        return self.rules.plan(tree, adapter=adapter, allow_import=allow_import)

    def check_changes(self, plan: Plan) -> None:
        """Raise `Error` (GP613) where the rules change something else than they did."""
        lines = difference(self.manifest.changes, changes_of(plan), plan.tree)
        if not lines:
            return
        raise Error(
            Diagnostic(
                "GP613",
                f"the rules of {self.folder} do not mean here what they meant when it was saved",
                text=lines,
                fixes=("the file was edited, or an op means something else in this version: save the adapter anew",),
            )
        )

    def check_content(self, tree: Tree) -> None:
        """Raise `Error` (GP618) where a hash of the base's bytes is recorded, and is not this base's."""
        if self.manifest.base.content is None:
            return
        if tree.fingerprint != self.made_on.fingerprint:
            log.info("%s: the bytes of a base in another dtype cannot be compared", self.folder)
        elif content_hash(tree, set(self.manifest.tensors.base)) != self.manifest.base.content:
            raise Error(
                Diagnostic(
                    "GP618",
                    f"{self.folder} was trained on a base with other weights",
                    text=("names, shapes and types are the same, and the bytes are not",),
                    fixes=("load the checkpoint that it was trained on",),
                )
            )
