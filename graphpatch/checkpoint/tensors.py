"""Which tensors make an adapter, and how others take their place: all of them, or none.

An adapter is what its patch added, and beside it whatever of the base is no longer what it was: weights that the rules
train (`train :*Norm`), and the running statistics of batch norms, which move without being trained.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from hashlib import sha256
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from ..lang.diagnostics import ApplyError, Diagnostic, Error
from ..patch.change import ModuleChange
from ..patch.original import originals
from ..patch.patch import Patch
from ..patch.record import Journal, journals_of
from ..plan.freeze import TRAIN
from ..plan.plan import Plan
from ..rewrites.quantised import is_quantised
from ..tree.tree import Tree

Named = dict[str, torch.Tensor]
Place = tuple[nn.Module, str]
"""Where a tensor is held: what moves with the model, and is copied with it, as the tensor itself is not."""


def journal_of(patch: Patch) -> Journal:
    """The journal of a patch that is there, switched on and not merged; raises `ApplyError` (GP509, GP532) else."""
    journal = next((j for j in journals_of(patch.model) if Patch(patch.model, j) == patch), None)
    if journal is None:
        raise ApplyError(Diagnostic("GP509", "this patch was reverted already"))
    if journal.disabled:
        raise ApplyError(Diagnostic("GP509", "the patch is switched off: leave `with patch.disabled()` first"))
    if journal.merged:
        title = "the patch is merged: the base is not what its factors belong to, nor are they what it computes with"
        fixes = ("patch.unmerge() first", "or save before patch.merge()")
        raise ApplyError(Diagnostic("GP532", title, fixes=fixes))
    return journal


# ── which ──


def added_tensors(patch: Patch) -> Named:
    """What the patch added, live, by the names in the model's `state_dict()`: parameters, and the persistent buffers of
    modules it brought in."""
    found = patch.adapter_state_dict()
    journal = journal_of(patch)
    for change in journal.changes:
        if isinstance(change, ModuleChange):
            for node, module, original in zip(change.nodes, change.modules, change.originals):
                kept = {id(t) for t in original.state_dict(keep_vars=True).values()}
                for name, tensor in module.state_dict(keep_vars=True).items():
                    if id(tensor) not in kept and not isinstance(tensor, nn.Parameter):
                        found[f"{journal.path(node)}.{name}".removeprefix(".")] = tensor
    return found


def moved_tensors(plan: Plan, model: nn.Module, taken: Collection[str], brought: Collection[str] = ()) -> Named:
    """What of the base is not what it was, live, by the first path it has in the unpatched model, as a selector
    (`^norm.weight`) where that name is `taken`: a wrapper may have a `weight` beside that of what it wraps.

    That is every parameter that the plan's rules train, or that requires grad now, running statistics, and what was
    `brought` by a file.
    """

    def add(node: int, name: str, tensor: torch.Tensor) -> None:
        key = _key(tree, node, name)
        found[f"^{key}" if key in taken else key] = tensor.detach()

    tree, found = plan.tree, Named()
    assert tree.modules is not None
    live = {id(part) for part in (*model.parameters(), *model.modules())}
    for node, module in enumerate(tree.modules):
        for name in tree.signature(node).parameters:
            parameter = module._parameters.get(name)
            if parameter is None or id(parameter) not in live or (node, name) in tree.first_of:
                continue
            asked = plan.grads is not None and plan.grads.of((node, name), new=False) == TRAIN
            if asked or parameter.requires_grad or _key(tree, node, name) in brought:
                add(node, name, parameter)
        runs = isinstance(module, _NormBase) and module.track_running_stats
        if id(module) in live and (runs or brought):
            for name, buffer in module._buffers.items():
                if buffer is not None and (runs or _key(tree, node, name) in brought):
                    add(node, name, buffer)
    return found


def base_place(tree: Tree, key: str) -> Place | None:
    """The module and the name there of the base's parameter or buffer that has this name in the unpatched model."""
    owner, _, name = key.removeprefix("^").rpartition(".")
    node = tree.find(owner)
    if node is None or tree.modules is None:
        return None
    module = tree.modules[node]
    return None if tensor_at((module, name)) is None else (module, name)


def tensor_at(place: Place) -> torch.Tensor | None:
    """The live parameter or buffer, detached."""
    own, name = place[0].__dict__, place[1]
    tensor = own["_parameters"].get(name)
    if tensor is None:
        tensor = own["_buffers"].get(name)
    return None if tensor is None else tensor.detach()


def content_hash(tree: Tree, without: Collection[str]) -> str:
    """A hash of the bytes of all base parameters but those named in `without`: of one that a patch keeps as codes, of
    what was there before. Raises `Error` (GP606)."""
    assert tree.modules is not None
    found, before = sha256(), originals(tree.modules[0])
    for node, module in enumerate(tree.modules):
        for name in tree.signature(node).parameters:
            key = _key(tree, node, name)
            if key in without or f"^{key}" in without or (node, name) in tree.first_of:
                continue
            try:
                value = whole(before.get((id(module), name), module._parameters[name]))
                if is_quantised(value):
                    raise TypeError
                blocks = value.reshape(-1).view(torch.uint8).split(2**24)
                found.update(f"{key} {value.dtype} {list(value.shape)}\n".encode())
                for block in blocks:
                    found.update(block.numpy().data)
            except (RuntimeError, TypeError, NotImplementedError):
                raise Error(
                    Diagnostic(
                        "GP606",
                        f"the bytes of `{key}` cannot be hashed: it is on the meta device, or kept as codes",
                        fixes=("save without hash_base",),
                    )
                ) from None
    return found.hexdigest()


def _key(tree: Tree, node: int, name: str) -> str:
    return f"{tree.paths[node]}.{name}" if node else name


# ── out ──


def whole(tensor: Any) -> torch.Tensor:
    """On the CPU, in one piece, contiguous; of a sharded one all of it, for which every rank must ask."""
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()
    return tensor.detach().cpu().contiguous()


def copied_out(tensors: Mapping[str, torch.Tensor]) -> Named:
    """The same, ready to be written; no two share memory. Raises `Error` (GP605) where there is nothing to write."""
    meta = next((key for key, tensor in tensors.items() if tensor.is_meta), None)
    if meta is not None:
        raise Error(
            Diagnostic(
                "GP605",
                f"`{meta}` is on the meta device, and has no values to save",
                fixes=(
                    "a patch on the meta device is a shape only: save the plan, plan.to_json()",
                    "if accelerate offloaded it: accelerate.hooks.remove_hook_from_module(model, recurse=True)",
                ),
            )
        )
    found, seen = Named(), set[int]()
    for key, tensor in tensors.items():
        value = whole(tensor)
        memory = value.untyped_storage()
        if memory.nbytes() != value.nbytes or memory.data_ptr() in seen:
            value = value.clone()
        seen.add(value.untyped_storage().data_ptr())
        found[key] = value
    return found


# ── in ──


def check(given: Mapping[str, Any], targets: Mapping[str, Any], what: str) -> None:
    """Whether each of `given` can be put where `targets` (tensors, or what a plan says of them) has its name.

    Raises `Error`: GP614 for names, GP615 for shapes and types.
    """
    refuse_names([key for key in targets if key not in given], [key for key in given if key not in targets], what)
    wrong = []
    for key, target in targets.items():
        value = given[key]
        if not isinstance(value, torch.Tensor):
            wrong.append(f"{key}: {type(value).__name__}, and no tensor")
        elif tuple(value.shape) != tuple(target.shape):
            wrong.append(f"{key}: {list(value.shape)}, and the model has {list(target.shape)}")
        elif not _fits(value.dtype, target.dtype):
            wrong.append(f"{key}: {_word(value.dtype)}, and the model has {_word(target.dtype)}")
    if wrong:
        raise Error(
            Diagnostic(
                "GP615",
                f"{len(wrong)} of {len(given)} tensors of {what} have another shape or type than the model's",
                text=tuple(_first(wrong)),
            )
        )


def refuse_names(missing: list[str], unexpected: list[str], what: str) -> None:
    """Raise `Error` (GP614) where there are any."""
    if missing or unexpected:
        lines = [f"- {key}   missing" for key in missing[:8]] + [f"+ {key}   unexpected" for key in unexpected[:8]]
        more = max(0, len(missing) - 8) + max(0, len(unexpected) - 8)
        raise Error(
            Diagnostic(
                "GP614",
                f"{what} has {len(missing)} tensors too few and {len(unexpected)} too many for this patch",
                text=(*lines, *([f"and {more} more"] if more else [])),
            )
        )


def _first(lines: list[str]) -> Iterator[str]:
    yield from lines[:8]
    if len(lines) > 8:
        yield f"and {len(lines) - 8} more"


def _word(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _fits(dtype: torch.dtype, target: Any) -> bool:
    """Floats fit floats, since an adapter may move to a base of another precision; all else must be the same."""
    target = getattr(torch, target, None) if isinstance(target, str) else target
    return dtype == target or (dtype.is_floating_point and target is not None and target.is_floating_point)


def put(given: Mapping[str, torch.Tensor], targets: Mapping[str, Any]) -> None:
    """Copy values into live tensors of the same names, `check`ed before.

    What was put is taken back if one fails (GP617). Raises `Error` (GP616) where targets are on the meta device.
    """
    meta = next((key for key, tensor in targets.items() if tensor.is_meta), None)
    if meta is not None:
        raise on_meta(meta)
    done: list[tuple[torch.Tensor, torch.Tensor]] = []
    try:
        with torch.inference_mode(False), torch.no_grad():
            for key, target in targets.items():
                value = _spread(given[key], target)
                done.append((target, target.clone()))
                target.copy_(value)
                if value.dtype != target.dtype and bool((target.isinf() & value.isfinite()).any()):
                    raise OverflowError(f"{key} has values too large for {_word(target.dtype)}")
    except BaseException as error:
        with torch.inference_mode(False), torch.no_grad():
            for target, before in reversed(done):
                target.copy_(before)
        if not isinstance(error, Exception):
            raise
        why = " ".join(str(error).split())[:300]
        raise Error(
            Diagnostic("GP617", "loading failed half-way, and the weights are as they were before", text=(why,))
        ) from error


def on_meta(key: str) -> Error:
    return Error(
        Diagnostic(
            "GP616",
            f"`{key}` is on the meta device, where weights cannot be loaded",
            fixes=("load the base's weights first, then the adapter",),
        )
    )


def _spread(value: torch.Tensor, target: Any) -> torch.Tensor:
    """As the target holds it: on its device, and where that is sharded, sharded alike."""
    value = value.detach()
    if hasattr(target, "full_tensor") and not hasattr(value, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value.to(target.device), target.device_mesh, target.placements, src_data_rank=None)
    return value.to(target.device)
