"""Models and modules that cannot be changed, or changed back, without going wrong in silence."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ..lang.diagnostics import ApplyError, Diagnostic
from ..tree.tree import Tree
from .record import SELECTED, roots
from .subclass import bypassed, is_foreign

_REPLICATED = {"DistributedDataParallel", "DataParallel"}
_FLATTENED = {"FullyShardedDataParallel"}
_SHARDED = {"FSDPModule"}


def refuse_distributed(model: nn.Module, tree: Tree, nodes: Iterable[int]) -> None:
    """Raise `ApplyError` where the model, or a module above a target, is replicated (GP507) or sharded (GP511)."""
    assert tree.modules is not None
    # The tree sees through wrappers, so those that stand inside the model are told by its signatures' notes.
    for name in [c.__name__ for c in type(model).__mro__] + list(tree.wrappers):
        _refuse(name, "the model")
    notes = {note for signature in tree.signatures for note in signature.notes}
    suspects = [n for n in notes if n == "fsdp" or n.removeprefix("wrapped:") in _REPLICATED | _FLATTENED]
    sharded = any("FSDPModule" in (c.__name__ for c in kind.__mro__) for kind in set(map(type, tree.modules)))
    if not suspects and not sharded:
        return
    hit = bytearray(len(tree))
    for node in nodes:
        hit[node] = 1
    for node, module in enumerate(tree.modules):
        names = {c.__name__ for c in type(module).__mro__}
        names |= {note.removeprefix("wrapped:") for note in tree.signature(node).notes}
        if names & (_REPLICATED | _FLATTENED | _SHARDED) and any(hit[node : tree.ends[node]]):
            for name in names:
                _refuse(name, f"`{tree.paths[node]}`" if node else "the model")


def _refuse(name: str, what: str) -> None:
    if name in _REPLICATED:
        raise ApplyError(
            Diagnostic(
                "GP507",
                f"{what} is already wrapped by {name}",
                text=("parameters added now would not be synchronised, and training would be wrong without an error",),
                fixes=(f'apply to the inner model, then wrap: graphpatch.apply(model, "lora"); ddp = {name}(model)',),
            )
        )
    if name in _FLATTENED | _SHARDED:
        how = "fully_shard" if name in _SHARDED else name
        raise ApplyError(
            Diagnostic(
                "GP511",
                f"{what} is already sharded by {how}",
                text=("parameters added now would be in no shard group, and so neither sharded nor reduced",),
                fixes=(f"patch before {how}: the patched model shards like any other",),
            )
        )


def refuse_bypassed(module: nn.Module, path: str, rule: str) -> None:
    """Raise `ApplyError` (GP501) where an instance attribute `forward` would keep a rewrite from being called."""
    how = bypassed(module)
    if how is None:
        return
    raise ApplyError(
        Diagnostic(
            "GP501",
            f"`{path}` has a `forward` of its own on the instance ({how}), which would be called past the rewrite",
            text=(rule,),
            fixes=("patch first, and hook or wrap `forward` afterwards", f"or take it off: {way_off(module)}"),
        )
    )


def way_off(module: nn.Module) -> str:
    """How an instance attribute `forward` goes away again."""
    if "_original_forward" in module.__dict__:
        return "accelerator.unwrap_model(model, keep_fp32_wrapper=False)"
    if hasattr(type(module), "kernel_layer_name"):
        return "del module.forward, which gives up the kernel of the hub"
    return "del module.forward"


def refuse_class(module: nn.Module, path: Callable[[], str], rule: str) -> None:
    """Raise `ApplyError` where the class is one that cannot be derived from (GP513)."""
    cls: Any = type(module)
    if is_foreign(module):
        why = f"its class was changed after an earlier patch, to {cls.__module__}.{cls.__qualname__}"
        fix = "patch everything before the model is sharded or converted"
    elif isinstance(module, torch.jit.ScriptModule):
        why, fix = "it is compiled by TorchScript, which keeps no Python class to derive from", "patch before scripting"
    else:
        return
    raise ApplyError(Diagnostic("GP513", f"`{path()}` cannot be rewritten", text=(rule, why), fixes=(fix,)))


def refuse_offloaded(module: nn.Module, path: str, rule: str) -> None:
    """Raise `ApplyError` (GP512) where accelerate fetches a module's weights at each call: not new ones."""
    hook = module.__dict__.get("_hf_hook")
    hooks: Sequence[Any] = getattr(hook, "hooks", (hook,))
    if any(getattr(h, "offload", False) for h in hooks):
        raise ApplyError(
            Diagnostic(
                "GP512",
                f"`{path}` is offloaded by accelerate",
                text=(
                    rule,
                    "its hook fetches the weights that were there when the model was dispatched, and no others",
                ),
                fixes=("patch before dispatch_model, or load with a device_map that offloads nothing here",),
            )
        )


def refuse_selected(model: nn.Module, known: Sequence[nn.Module] | None = None) -> None:
    """Raise `ApplyError` (GP549) within `per_sample`, where nothing else may change. `known` are the model's roots."""
    if any(SELECTED in root.__dict__ for root in (roots(model) if known is None else known)):
        raise ApplyError(
            Diagnostic(
                "GP549",
                "adapters are chosen for each sample here, and nothing else can change meanwhile",
                fixes=("leave `with adapters(model).per_sample(...)` first",),
            )
        )
