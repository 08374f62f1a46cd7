"""The handle on an applied plan."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib import import_module
from operator import attrgetter, itemgetter
from os import PathLike
from typing import Any, NamedTuple

import torch
from torch import nn

from ..lang.diagnostics import ApplyError, Diagnostic
from .change import ModuleChange, WeightChange
from .fast_path import FastPathChange
from .grads import forget_gone, restore_flags
from .in_place import InPlaceChange
from .merge import bake, merge, taken_out, unmerge
from .probe import silent_modules
from .record import JOURNALS, Journal, journals_of, roots
from .refuse import refuse_selected, way_off
from .subclass import bypassed, is_foreign


class Applied(NamedTuple):
    """One op on one module, as it was done."""

    path: str
    rule: str
    """Where the rule stands: `lora.rules:5`."""
    op: str
    """The op as a rule writes it: `lora(rank=16)`."""


class Patch:
    """What one `apply` did to a model. `patches(model)` gives it back, also from a copy or an unpickled model."""

    def __init__(self, model: nn.Module, journal: Journal):
        self.model, self._journal = model, journal

    @property
    def id(self) -> str:
        """The id of the plan."""
        return self._journal.id

    @property
    def record(self) -> Mapping[str, Any]:
        """The rules and parameters it came from, as JSON values."""
        return self._journal.record

    @property
    def changes(self) -> list[Applied]:
        """What was done, rule by rule, one entry a module and op."""
        path = self._journal.path
        return [
            Applied(path(node), change.mark.rule, change.mark.op)
            for change in self._journal.changes
            if not isinstance(change, FastPathChange)
            for node in change.nodes
        ]

    # ── parameters ──
    def trainable_parameters(self) -> list[nn.Parameter]:
        """Every parameter of the model that requires grad, tied ones once: what to give to an optimizer.

        That is what the file's `freeze` and `train` left, whether a patch added it or not.
        """
        return [p for p in self.model.parameters() if p.requires_grad]

    def adapter_state_dict(self) -> dict[str, torch.Tensor]:
        """The parameters that this patch added, by the name they have in the model's `state_dict()` and in
        its order, detached."""
        found: list[tuple[int, str, torch.Tensor]] = []
        for change in self._journal.changes:
            for at, (node, module) in enumerate(zip(change.nodes, change.modules)):
                if isinstance(change, InPlaceChange):
                    found += [(node, name, attrgetter(name)(module)) for name in change.added]
                elif isinstance(change, ModuleChange):
                    kept = {id(p) for p in change.originals[at].parameters()}
                    found += [(node, name, p) for name, p in module.named_parameters() if id(p) not in kept]
        found.sort(key=itemgetter(0))
        path = self._journal.path
        return {f"{path(node)}.{name}".removeprefix("."): p.detach() for node, name, p in found}

    # ── on and off ──
    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within, the model computes as if this patch were not there. Parameters stay registered and keep their flags,
        so this also works on a model that was sharded or replicated after patching. Of a merged patch the weights
        change places with the kept ones meanwhile; raises `ApplyError` (GP532) where none were kept."""
        self._refuse_gone()
        self._refuse_let_go()
        refuse_selected(self.model)
        journal = self._journal
        if journal.disabled:
            yield
            return
        with ExitStack() as stack:
            stack.enter_context(taken_out(journal, self._others))
            journal.disabled = True
            stack.callback(setattr, journal, "disabled", False)
            for change in reversed(journal.changes):
                stack.enter_context(change.switched_off())
            yield

    def probe(self, batch: Any, strict: bool = True) -> list[str]:
        """Run the model once on `batch` and name the rewritten modules whose rewrite was never reached.

        `batch` is a dict (keyword arguments), a tuple or list (positional ones) or a single value. The run is in eval
        mode without gradients, and leaves modes, buffers and the random state as they were. Returns the paths of
        the silent modules; with `strict`, raises `ApplyError` (GP514) if there are any.
        """
        self._refuse_gone()
        targets = {
            id(module): (module, self._journal.path(node))
            for change in self._journal.changes
            if isinstance(change, (InPlaceChange, ModuleChange))
            for node, module in zip(change.nodes, change.modules)
        }
        silent = silent_modules(self.model, batch, list(targets.values()))
        if silent and strict:
            shown = ", ".join(f"`{path or '^'}`" for path in silent[:8])
            raise ApplyError(
                Diagnostic(
                    "GP514",
                    f"{len(silent)} of {len(targets)} rewritten modules were not called on this batch",
                    text=(shown + (f" and {len(silent) - 8} more" if len(silent) > 8 else ""),),
                    fixes=(
                        "code that reads a module's weight without calling it passes the rewrite by: leave those out",
                        "a batch need not reach them all (routed experts): patch.probe(batch, strict=False) lists them",
                    ),
                )
            )
        return silent

    # ── into the weights, and out again ──
    @property
    def merged(self) -> bool:
        """Whether what the patch does is in the weights."""
        return self._journal.merged is not None

    def merge(self, *, keep: bool = True) -> None:
        """Put the patch's updates into the weights: the model computes the same, at the price of the base alone.

        W + s B A, worked out in float32 (of a float64 base in float64) a block of rows at a time, and rounded to the
        weight's dtype once. The weights are written in place; the factors stay, and stay what
        `adapter_state_dict()` gives. `keep` keeps copies of the weights as they were, on the CPU, from which `unmerge`
        is bit-identical; without, nothing is kept, and `unmerge` wants the base's checkpoint. Each patch merges by
        itself; of several in the same weights, the last comes out first.

        What a quantised weight stands for gains the update, and is quantised again with the same settings, which
        rounds it: a warning says so. Another parameter stands there then; `unmerge` puts back the one that was.

        Raises `ApplyError`, and then nothing has changed: GP531 for an op that is no change of weights, and for weights
        that are tied, sharded, on the meta device, or in codes that cannot be made anew; GP532 where it is merged
        already; GP533 where a weight would hold a NaN or an infinity; GP544 where a library refuses to quantise.
        """
        self._refuse_off("merge")
        if self.merged:
            raise ApplyError(Diagnostic("GP532", "this patch is merged already", fixes=("patch.unmerge() first",)))
        merge(self.model, self._journal, self._others, keep)

    def unmerge(self, base: str | PathLike[str] | Mapping[str, torch.Tensor] | None = None) -> None:
        """Give the weights back, bit for bit, as they were before `merge`, and compute with the factors again.

        From the copies that were kept, or, with `base`, from the checkpoint the model was loaded from (a safetensors
        file or a directory of them; also a state dict). Raises `ApplyError`, and then nothing has changed: GP532 where
        there is nothing to take out, nothing was kept, or a later patch has to come out first; GP534 where the
        weights were changed since; GP641 to GP643 where the checkpoint has not these weights.
        """
        self._refuse_off("unmerge")
        if not self.merged:
            raise ApplyError(Diagnostic("GP532", "this patch is not merged"))
        read = None
        if base is not None:
            # As `Plan.apply` does: the room that reads files is opened only when there is one to be read.
            read = partial(import_module("graphpatch.checkpoint.merging.read").read_weights, base)
        unmerge(self.model, self._journal, self._others, read)

    def bake(self) -> None:
        """Merge for good: plain modules of plain classes, whose weights hold the updates, no factors and no record. The
        `requires_grad` flags are those of before the patch, and this handle is done with. PEFT calls it
        `merge_and_unload`.

        Raises `ApplyError` as `merge` and `revert` do; then nothing has changed.
        """
        self._refuse_off("bake")
        self._refuse_in_the_way(back=False)
        bake(self.model, self._journal, self._others)
        undo(self.model, self._journal)

    @property
    def _others(self) -> list[Journal]:
        return [other._journal for other in patches(self.model) if other != self]

    # ── undo ──
    def revert(self) -> None:
        """Give the model back as it was: the same module objects, classes, attributes and `requires_grad` flags.

        Weights that trained in the meantime keep their values; those that a patch kept frozen are bit-identical. A
        merged patch is unmerged first. Patches revert in any order, unless a later one changed what this one brought
        in; raises `ApplyError` (GP508) then, naming it, or where something done to the model since stands in the way.
        """
        self._refuse_off("revert")
        self._refuse_in_the_way()
        if self.merged:
            unmerge(self.model, self._journal, self._others, None)
        undo(self.model, self._journal)
        self._warn_of_orphans()

    def _refuse_off(self, doing: str) -> None:
        self._refuse_gone()
        refuse_selected(self.model)
        if self._journal.disabled:
            fix = f"leave `with patch.disabled()` to {doing} it"
            raise ApplyError(Diagnostic("GP509", f"the patch is switched off: {fix}"))

    def _refuse_let_go(self) -> None:
        for change in self._journal.changes:
            if isinstance(change, WeightChange) and change.gone:
                raise ApplyError(
                    Diagnostic(
                        "GP541",
                        f"the original weights of {change.mark.op} were let go (keep=false), so there is no way back",
                        fixes=("load the base anew", "or leave keep=false out: the originals are kept then"),
                    )
                )

    def _refuse_in_the_way(self, back: bool = True) -> None:
        """Raise where something done to the model since would be lost, or lost in silence; `back` is whether the
        original weights are wanted."""
        self._refuse_hanging()
        if back:
            self._refuse_let_go()
        for change in self._journal.changes:
            if isinstance(change, InPlaceChange):
                for at, module in enumerate(change.modules):
                    if is_foreign(module):
                        raise self._in_the_way(change.nodes[at], _derived(type(module)))
                    how = bypassed(module) if "forward" in module.__dict__ else None
                    if how:
                        why, fix = f"its forward was wrapped since ({how})", f"take that off first: {way_off(module)}"
                        raise self._in_the_way(change.nodes[at], why, fix)

    def _refuse_gone(self) -> None:
        if not any(journal is self._journal for journal in journals_of(self.model)):
            raise ApplyError(Diagnostic("GP509", "this patch was reverted already"))

    def _refuse_hanging(self) -> None:
        """A later patch hangs on this one if it changed a module that this one brought."""
        brought: set[nn.Module] = set()
        for change in self._journal.changes:
            if isinstance(change, ModuleChange):
                for new, original in zip(change.modules, change.originals):
                    brought.update(set(new.modules()).difference(original.modules()))
        if not brought:
            return
        for other in patches(self.model):
            if other._journal is self._journal:
                continue
            for change in other._journal.changes:
                if not brought.isdisjoint(change.modules):
                    raise ApplyError(
                        Diagnostic(
                            "GP508",
                            f"a later patch hangs on this one: {change.mark.rule}, {change.mark.op}",
                            text=("it changed a module that this patch put into the model",),
                            fixes=("revert that one first: graphpatch.patches(model)[-1].revert()",),
                        )
                    )

    def _in_the_way(self, node: int, why: str, fix: str = "") -> ApplyError:
        return ApplyError(
            Diagnostic(
                "GP521",
                f"`{self._journal.path(node) or '^'}` cannot be changed back: {why}",
                fixes=(
                    fix or "take that away first, or revert before it is done",
                    "`with patch.disabled()` computes without the patch meanwhile",
                ),
            )
        )

    def _warn_of_orphans(self) -> None:
        inside = set(self.model.modules())
        orphans = [
            self._journal.path(node) or "^"
            for change in self._journal.changes
            if not isinstance(change, ModuleChange)
            for node, module in zip(change.nodes, change.modules)
            if module not in inside
        ]
        if orphans:
            warnings.warn(
                f"graphpatch: {', '.join(orphans[:8])}: no longer in the model (replaced since the patch, as "
                "`resize_token_embeddings` does). The module that was patched is as it was before; what stands in its "
                "place was never patched.",
                stacklevel=3,
            )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Patch) and other._journal is self._journal

    def __hash__(self) -> int:
        return id(self._journal)

    def __repr__(self) -> str:
        rules = sorted({change.mark.rule.rpartition(":")[0] or change.mark.rule for change in self._journal.changes})
        if not any(journal is self._journal for journal in journals_of(self.model)):
            return f"<Patch {', '.join(rules) or self.id}: reverted>"
        added = sum(p.numel() for p in self.adapter_state_dict().values())
        return f"<Patch {', '.join(rules) or self.id}: {len(self.changes)} changes, {added} parameters added>"


def _derived(cls: type) -> str:
    if any(c.__name__ == "FSDPModule" for c in cls.__mro__):
        return "it was sharded by fully_shard since, and would lose that in silence"
    return f"its class was changed since, to {cls.__module__}.{cls.__qualname__}"


def patches(model: nn.Module) -> list[Patch]:
    """The handles of all patches that `model` carries, the oldest first; also those of modules inside it."""
    return [Patch(root, journal) for root in roots(model) for journal in journals_of(root)]


def adapter_changes(journal: Journal) -> Iterator[InPlaceChange]:
    """Those that add to an adapter, as an entry with a field `adapter` does, which is its name."""
    for change in journal.changes:
        if isinstance(change, InPlaceChange) and hasattr(change.entry, "adapter"):
            yield change


def undo(root: nn.Module, journal: Journal) -> None:
    """Take back what `journal` tells of, be it complete or not."""
    kept = journals_of(root)
    for change in reversed(journal.changes):
        change.undo()
    at = next((i for i, other in enumerate(kept) if other is journal), len(kept))
    restore_flags(journal, kept[at + 1 :])
    kept = [other for other in kept if other is not journal]
    forget_gone(kept)
    if kept:
        root.__dict__[JOURNALS] = kept
    else:
        root.__dict__.pop(JOURNALS, None)
