"""What stands before the class of a model's root so that Hugging Face's own code saves and resumes the adapter alone.

A Trainer saves by `model.save_pretrained` and resumes by `model.load_state_dict`, without a word to its callbacks. So
these two are answered here, by a class in front as in every rewrite: instance attributes would be lost or shared by a
copy of the model.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

from ..checkpoint.tensors import journal_of
from ..lang.diagnostics import Diagnostic, Error
from ..patch.patch import Patch, patches
from ..patch.subclass import class_with, set_class
from ..rewrites.rewrite import InPlace
from ..tree.tree import Mark
from .folder import CHANGES, put_back, write
from .merged import save_merged


class Saving(NamedTuple):
    """The entry of `SavesAdapter`."""

    patch: str
    """The id of the patch's plan."""
    peft: bool
    admitted: bool
    """Whether a quantised model passes for one that can be trained, as it does once it has adapters."""


class _Admitted:
    """`_hf_peft_config_loaded`: by nothing else does `Trainer.__init__` learn that a quantised model has adapters.

    Private, and so only raised on a quantised model, from the making of the callback until `on_init_end`. No data
    descriptor: whoever sets the attribute on the model has it as before.
    """

    def __get__(self, model: Any, owner: type) -> bool:
        return model is not None and any(saving.admitted for saving in _saving(model))


class SavesAdapter(InPlace):
    """The model writes its adapter where it would write itself, and takes from a checkpoint only what fits it."""

    entries = "_graphpatch_saving"
    _hf_peft_config_loaded = _Admitted()

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Any] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write the adapter alone; `graphpatch.load_adapter(base, save_directory)` reads it. While the patch is merged,
        write the whole model.

        `state_dict` and what says how to lay out a whole model are passed over for an adapter.
        """
        below: Any = super()
        patch, peft = _patch_of(self)
        if patch is None:
            below.save_pretrained(save_directory, is_main_process, state_dict, push_to_hub, **kwargs)
            return
        if patch.merged:
            save_merged(self, save_directory, is_main_process=is_main_process, push_to_hub=push_to_hub, **kwargs)
            return
        if is_main_process:
            write(patch, save_directory, peft)
        if push_to_hub:
            # Which saves into a folder of its own, by this very method, and uploads that.
            name = kwargs.pop("repo_id", None) or os.path.basename(os.path.abspath(save_directory))
            known = ("token", "private", "commit_message", "revision", "create_pr")
            below.push_to_hub(name, **{key: kwargs[key] for key in known if key in kwargs})

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As ever, but a checkpoint of adapters alone goes in whole, or is refused: it lacks the base, and must not
        lack anything else."""
        if CHANGES not in state_dict or _patch_of(self)[0] is None:
            return super().load_state_dict(state_dict, strict, assign)
        put_back(self, state_dict)
        return super().load_state_dict({}, strict=False)._replace(missing_keys=[], unexpected_keys=[])


def _saving(model: Any) -> tuple[Saving, ...]:
    return model.__dict__.get(SavesAdapter.entries, ())


def _patch_of(model: nn.Module) -> tuple[Patch | None, bool]:
    """The patch that the model saves, and whether in PEFT's format too."""
    for saving in _saving(model):
        for patch in patches(model):
            if patch.id == saving.patch and patch.model is model:
                return patch, saving.peft
    return None, False


@dataclass(eq=False)
class Attached:
    """A `graphpatch.patch.change.Change`: `SavesAdapter` before the root's class. Reverting the patch undoes it."""

    mark: Mark
    root: nn.Module
    saving: Saving
    nodes: list[int] = field(default_factory=list)
    modules: list[nn.Module] = field(default_factory=list)
    """Neither has any: nothing that is computed was changed."""

    def do(self) -> None:
        self.root.__dict__[SavesAdapter.entries] = (self.saving,)
        set_class(self.root, class_with(self.root, lambda mixins: (*mixins, SavesAdapter)))

    def undo(self) -> None:
        self.root.__dict__.pop(SavesAdapter.entries, None)
        set_class(self.root, class_with(self.root, lambda mixins: (m for m in mixins if m is not SavesAdapter)))

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        yield  # saving says itself that a patch which is switched off cannot be saved


def attach(patch: Patch, peft: bool) -> None:
    """Have the model save what `patch` added. Raises `Error` (GP651) where it saves another patch already."""
    others = [saving for saving in _saving(patch.model) if saving.patch != patch.id]
    if others:
        raise Error(
            Diagnostic(
                "GP651",
                "this model already saves the adapter of another patch",
                fixes=("one AdapterCheckpoint a model: detach() the other first",),
            )
        )
    detach(patch)
    changes = journal_of(patch).changes
    mark = Mark(patch.id, changes[0].mark.rule if changes else "", "AdapterCheckpoint", frozenset())
    change = Attached(mark, patch.model, Saving(patch.id, peft, bool(getattr(patch.model, "is_quantized", False))))
    change.do()
    changes.append(change)


def end_admission(patch: Patch) -> None:
    """The Trainer was made: from here on a quantised model answers as it does without this."""
    own = patch.model.__dict__
    own[SavesAdapter.entries] = tuple(saving._replace(admitted=False) for saving in _saving(patch.model))


def detach(patch: Patch) -> None:
    """The model saves itself whole again, as Hugging Face does it."""
    journal = journal_of(patch)
    for change in [change for change in journal.changes if isinstance(change, Attached)]:
        change.undo()
        journal.changes.remove(change)
