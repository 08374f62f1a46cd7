"""Adapters that start from what quantising took from a weight: they need the weight as it was before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from ..lang.diagnostics import ApplyError, Diagnostic
from .change import Change, WeightChange
from .in_place import InPlaceChange
from .original import originals


def refuse_unknown(changes: Sequence[Change], root: nn.Module, paths: Sequence[str]) -> None:
    """Raise `ApplyError` (GP595) where such a weight is not at hand; nothing has changed yet."""
    approaching = list(_approaching(changes))
    if not approaching:
        return
    known = {module for module, _ in originals(root)}
    known |= {id(module) for change in changes if isinstance(change, WeightChange) for module in change.modules}
    for change in approaching:
        for node, module in zip(change.nodes, change.modules):
            if id(module) not in known:
                raise ApplyError(
                    Diagnostic(
                        "GP595",
                        f"{change.mark.op} on `{paths[node] or '^'}` needs its weight as it was before quantising",
                        text=(change.mark.rule, "it is not quantised, or not by a patch that kept the original"),
                        fixes=("quantise in the same rule: quantize.nf4() then lora(...)", "or take another init"),
                    )
                )


def approach(changes: Sequence[Change], root: nn.Module) -> None:
    """Fill them, now that the weights are quantised and their originals not yet let go."""
    approaching = list(_approaching(changes))
    before = originals(root) if approaching else {}
    for change in approaching:
        for module in change.modules:
            original = before[id(module), "weight"]
            if not original.is_meta:
                own = {**module._parameters, **module._buffers}
                tensors = {name: own[name].data for name in change.added}  # type: ignore[union-attr]
                change.mixin.approach(change.entry, tensors, module, original.detach())


def _approaching(changes: Sequence[Change]) -> Iterator[InPlaceChange]:
    return (c for c in changes if isinstance(c, InPlaceChange) and c.initialise and c.mixin.approaches(c.entry))
