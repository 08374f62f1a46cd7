"""What a checkpoint folder holds, and how it is put back: the adapter alone, never the base.

`adapter.json` and `adapter.safetensors` are what `load_adapter` reads. `model.safetensors` is where a Trainer looks for
weights; here it has those that train, by their names in the model, and beside them what the rules changed: a Trainer
hands over nothing of a checkpoint but its tensors, so that travels as one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from ..checkpoint.changes import difference
from ..checkpoint.manifest import Change
from ..checkpoint.moved import brought
from ..checkpoint.peft.export import to_peft
from ..checkpoint.save import changes_of, save_adapter
from ..checkpoint.tensors import Named, added_tensors, check, copied_out, moved_tensors, put
from ..lang.diagnostics import Diagnostic, Error
from ..patch.original import original_plan
from ..patch.patch import Patch, patches
from ..plan.plan import Plan

WEIGHTS = "model.safetensors"
CHANGES = "graphpatch.changes"
"""The key of the tensor that holds, as bytes of JSON, what the rules changed."""


def write(patch: Patch, folder: str | os.PathLike[str], peft: bool) -> None:
    """Write the adapter, and what a Trainer resumes from, into `folder`; with `peft`, PEFT's two files too.

    Raises `Error` as `save_adapter` and `to_peft` do, GP604 where the files cannot be written, GP658 where a model is
    there already.
    """
    if Path(folder, "config.json").exists():
        raise Error(
            Diagnostic(
                "GP658",
                f"{folder} holds a model, whose weights an adapter must not replace",
                fixes=("give the adapter a folder of its own",),
            )
        )
    save_adapter(patch, folder)
    if peft:
        to_peft(patch, folder)
    plans = _plans(patch.model)
    said = torch.frombuffer(bytearray(json.dumps(_changes(plans)).encode()), dtype=torch.uint8)
    path = Path(folder, WEIGHTS)
    partial = path.with_name(f".{WEIGHTS}.partial")
    try:
        # Last, and under its name when it is whole: a folder without it is none that a Trainer would resume from.
        save_file({CHANGES: said, **copied_out(_trained(patch.model, plans))}, partial, metadata={"format": "pt"})
        partial.chmod(Path(folder, "adapter.json").stat().st_mode)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        why = getattr(error, "strerror", None) or " ".join(str(error).split())[:300]
        raise Error(Diagnostic("GP604", f"the adapter cannot be written to {folder}", text=(why,))) from None


def put_back(model: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Put the tensors of a checkpoint into the patched model: all, or none.

    Raises `Error`: GP652 where it was made with other rules, GP614 and GP615 where names, shapes or types differ.
    """
    given = dict(state_dict)
    said = given.pop(CHANGES)
    try:
        then = [Change.model_validate(change) for change in json.loads(bytes(said.tolist()))]
    except ValueError:
        why = "the checkpoint does not say by what rules it was made: it is damaged, or of another version"
        raise Error(Diagnostic("GP652", why)) from None
    plans = _plans(model)
    now = [Change.model_validate(change) for change in _changes(plans)]
    lines = difference(then, now, next(iter(plans.values())).tree)
    if lines:
        raise Error(
            Diagnostic(
                "GP652",
                "the checkpoint was made with other rules than this model's",
                text=lines,
                fixes=("apply the rules of the checkpoint, or train anew: it cannot be resumed with these",),
            )
        )
    targets = _trained(model, plans)
    check(given, targets, "the checkpoint")
    put(given, targets)


def _plans(model: nn.Module) -> dict[Patch, Plan]:
    """Of every patch on the model, as if it were the only one."""
    return {patch: original_plan(patch) for patch in patches(model)}


def _changes(plans: Mapping[Patch, Plan]) -> list[dict[str, Any]]:
    """What the rules of all patches changed, as JSON values."""
    return [change.model_dump(mode="json") for plan in plans.values() for change in changes_of(plan)]


def _trained(model: nn.Module, plans: Mapping[Patch, Plan]) -> Named:
    """Everything in the model that training moves, live, by its first name in the `state_dict`: what the patches
    added, what of the base is no longer what it was, and whatever requires grad."""
    wanted = set[Any]()
    for patch, plan in plans.items():
        added = added_tensors(patch)
        wanted.update(
            map(_memory, (*added.values(), *moved_tensors(plan, patch.model, added, brought(patch)).values()))
        )
    found, seen = Named(), set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, torch.Tensor) and (tensor.requires_grad or _memory(tensor) in wanted):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                found[name] = tensor.detach()
    return found


def _memory(tensor: torch.Tensor) -> Any:
    """What a tensor shares with its detached self, and with no other."""
    if type(tensor) not in (torch.Tensor, nn.Parameter):
        return id(tensor)
    return tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape)
