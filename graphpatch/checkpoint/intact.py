"""Is what a patch put into a model still what the model uses? `resize_token_embeddings` sees to it that it is not."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..lang.diagnostics import Diagnostic, Error
from ..patch.in_place import InPlaceChange
from ..patch.patch import Patch
from ..plan.plan import Plan
from .tensors import journal_of


def refuse_outgrown(patch: Patch, plan: Plan, added: Mapping[str, torch.Tensor]) -> None:
    """Raise `Error` (GP655) where a patched module was replaced since, or has another shape than its new tensors.

    `plan` is the patch's, made of the model as it stands; `added` is what the patch added then.
    """
    journal = journal_of(patch)
    inside = set(patch.model.modules())
    found = [
        f"{journal.path(node) or '^'}   another module is in its place"
        for change in journal.changes
        if isinstance(change, InPlaceChange)
        for node, module in zip(change.nodes, change.modules)
        if module not in inside
    ]
    for step in plan.steps:
        for node in step.nodes if step.adds else ():
            path = f"{plan.tree.paths[node]}." if node else ""
            for name, wanted in step.adds.items():
                tensor = added.get(path + name)
                if tensor is not None and tuple(tensor.shape) != tuple(wanted.shape):
                    found.append(f"{path}{name}   {list(tensor.shape)}, and by now it should be {list(wanted.shape)}")
    if found:
        raise Error(
            Diagnostic(
                "GP655",
                "the model has outgrown its patch: modules were resized or replaced since",
                text=(*found[:8], *([f"and {len(found) - 8} more"] if len(found) > 8 else [])),
                fixes=("resize first (`resize_token_embeddings`), then apply the rules",),
            )
        )
