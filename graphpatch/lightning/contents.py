"""What a checkpoint of a transformed module holds: what the transform brought, what trains, and what changed. Not the
base, which has files of its own."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from hashlib import blake2b
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import nn

from ..lang.diagnostics import refusal
from ..patch.patch import patches
from ..patch.record import record_of
from ..plan.ruleset import RuleSet
from .random_state import Randomness
from .reference import Weight, check_reference, path_of, reference, weights_of

KEY = "graphpatch"
"""Of what is ours in a checkpoint."""
FORMAT = 1
_KEPT = "_graphpatch_kept"
_BESIDE_AVERAGE = "current_model_state"
"""Where `WeightAveraging` puts the weights that train, when `state_dict` is their average."""
_COMPILED = "_orig_mod."
_Hook = Callable[[dict[str, Any]], None]


class Kept(NamedTuple):
    """What is known of a module's state from the moment of its transform. Plain data: copied and pickled with it."""

    added: frozenset[str]
    """Names in the state dict that the base did not have."""
    buffers: dict[str, str]
    """Of the base's buffers, a hash of what they held then: those that changed are saved."""
    weights: dict[str, Weight]
    """What a checkpoint says of the base's weights."""
    path: str | None
    """Where they came from."""


@contextmanager
def keep_what_changes(module: pl.LightningModule, base_checkpoint: Any = None) -> Iterator[None]:
    """Around a transform: notes what is new afterwards, and makes the module's checkpoints hold that."""
    before = {id(tensor) for tensor in module.state_dict(keep_vars=True).values()}
    known: Kept | None = module.__dict__.get(_KEPT)
    yield
    after = module.state_dict(keep_vars=True)
    # Also what a transform brought before this one: in the user's configure_model, or before fit.
    added = {name for name, tensor in after.items() if id(tensor) not in before} | _brought(module)
    buffers = {n: _digest(t) for n, t in after.items() if n not in added and not isinstance(t, nn.Parameter)}
    was = known or Kept(frozenset(), buffers, weights_of(module), path_of(module, base_checkpoint))
    module.__dict__[_KEPT] = was._replace(added=was.added | added)
    if known is None:
        module.on_save_checkpoint = partial(_on_save, module, module.on_save_checkpoint)  # type: ignore[method-assign]
        module.on_load_checkpoint = partial(_on_load, module, module.on_load_checkpoint)  # type: ignore[method-assign]
        module.register_load_state_dict_pre_hook(_fill)


def _brought(module: nn.Module) -> set[str]:
    """The names of what patches added, read off the modules that they changed."""
    names: set[str] = set()
    for path, part in module.named_modules():
        record, dot = record_of(part), f"{path}." if path else ""
        names |= {dot + name for name in record.added if name not in part._modules}
        if record.original is not None:
            theirs = {id(t) for t in record.original.state_dict(keep_vars=True).values()}
            names |= {dot + n for n, t in part.state_dict(keep_vars=True).items() if id(t) not in theirs}
    return names


def names_to_save(module: nn.Module) -> set[str]:
    """The names in the module's state dict of what is not the base's, or is not what it was."""
    kept: Kept = module.__dict__[_KEPT]
    trained = {name for name, p in module.named_parameters(remove_duplicate=False) if p.requires_grad}
    buffers = module.named_buffers(remove_duplicate=False)
    changed = {name for name, t in buffers if name in kept.buffers and _digest(t) != kept.buffers[name]}
    return {*kept.added, *trained, *changed}


def _digest(tensor: torch.Tensor) -> str:
    if not isinstance(tensor, torch.Tensor) or tensor.is_meta:
        return ""
    whole: Any = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    data = whole.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return blake2b(data.numpy().data, digest_size=16).hexdigest()


def _reference(module: nn.Module, saved: set[str]) -> dict[str, Any]:
    kept: Kept = module.__dict__[_KEPT]
    left_out = {name.replace(_COMPILED, ""): weight for name, weight in kept.weights.items() if name not in saved}
    return reference(left_out, kept.path)


# ── out ──


def _on_save(module: pl.LightningModule, original: _Hook, checkpoint: dict[str, Any]) -> None:
    """The module's own hook, then ours: the last that is called, and for weights-only checkpoints too."""
    original(checkpoint)
    names = names_to_save(module)
    for key in ("state_dict", _BESIDE_AVERAGE):
        if key in checkpoint:
            checkpoint[key] = {n: t for n, t in checkpoint[key].items() if n in names}
    checkpoint[KEY] = {
        "format": FORMAT,
        "patches": [json.loads(json.dumps(dict(patch.record))) for patch in patches(module)],
        "names": sorted(names),
        "base": _reference(module, names),
    }
    if "loops" in checkpoint:
        checkpoint[KEY]["random"] = Randomness.of(module).gathered(at_end=bool(module.trainer.is_last_batch))


# ── in ──


class Window:
    """While open, the module's state dict is what its checkpoints hold, and loading is not strict.

    For strategies that load by themselves, before any hook, into what the module says it has (FSDP2): they would ask a
    checkpoint for the base.
    """

    def __init__(self, module: pl.LightningModule):
        self.module, self.strict = module, module.strict_loading
        self.handle = module.register_state_dict_post_hook(_drop)
        module.strict_loading = False

    def close(self) -> None:
        self.handle.remove()
        self.module.strict_loading = self.strict


def _drop(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    if _KEPT in module.__dict__:
        ours = {prefix + name for name in names_to_save(module)}
        for name in [name for name in state_dict if name.startswith(prefix) and name not in ours]:
            del state_dict[name]


def _fill(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before loading: what a checkpoint leaves to the base is what the module has. So strict loading stays strict about
    the rest."""
    if _KEPT not in module.__dict__:
        return
    needed = names_to_save(module)
    for name, tensor in module.state_dict(keep_vars=True).items():
        if name not in needed or name in module.__dict__[_KEPT].buffers:
            state_dict.setdefault(prefix + name, tensor.detach() if isinstance(tensor, torch.Tensor) else tensor)


def named_as_here(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """`torch.compile(net)` puts a word into every name; what was saved with it loads without, and the other way."""
    here = {name.replace(_COMPILED, ""): name for name in module.state_dict(keep_vars=True)}
    for key in ("state_dict", _BESIDE_AVERAGE):
        if key in checkpoint:
            held = checkpoint[key]
            checkpoint[key] = {here.get(name.replace(_COMPILED, ""), name): tensor for name, tensor in held.items()}


def _on_load(module: pl.LightningModule, original: _Hook, checkpoint: dict[str, Any]) -> None:
    named_as_here(module, checkpoint)
    check_loadable(module, checkpoint)
    Randomness.of(module).read(checkpoint.get(KEY, {}).get("random"))
    original(checkpoint)


def check_loadable(module: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Raise `ApplyError` where a checkpoint is not one of this module, transformed as it is: GP830 where it has nothing
    of ours, GP831 where it was made by other rules, GP832 where tensors are missing, GP834 where it was made on another
    base."""
    ours = checkpoint.get(KEY)
    if ours is None:
        raise refusal(
            "GP830",
            "this checkpoint was saved by a module that no transform had changed",
            "if it is the base: base_checkpoint=..., and no ckpt_path",
        )
    now, then = [p.record for p in patches(module)], ours.get("patches", [])
    if [_said(r) for r in now] != [_said(r) for r in then]:
        raise refusal(
            "GP831",
            "this checkpoint was made by other rules than the module's now",
            "resume with the rules it was made by; or start anew from the base, without ckpt_path",
            text=tuple(_difference(then, now)),
        )
    # Of a sharded checkpoint the names alone are in the part that is read here.
    held = checkpoint.get("state_dict") or ours.get("names", ())
    if held is None:
        return  # of a strategy that holds tensors against the model itself
    kept: Kept = module.__dict__[_KEPT]
    missing = sorted(names_to_save(module) - set(held) - set(kept.buffers))
    if missing:
        few = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
        raise refusal("GP832", f"this checkpoint lacks {len(missing)} tensors that train: {few}", "take a whole one")
    check_reference(ours.get("base"), _reference(module, names_to_save(module)))


def _said(record: Mapping[str, Any]) -> str:
    return json.dumps([record.get("rules"), record.get("params"), record.get("adapter")], sort_keys=True)


def _difference(then: list[Mapping[str, Any]], now: list[Mapping[str, Any]]) -> list[str]:
    """Line by line, what the rules said and say."""
    old, new = ([line for r in records for line in _lines(r)] for records in (then, now))
    return [
        line for line in difflib.unified_diff(old, new, lineterm="", n=0) if not line.startswith(("---", "+++", "@@"))
    ][:12]


def _lines(record: Mapping[str, Any]) -> list[str]:
    try:
        files = RuleSet.from_json(json.dumps(record["rules"])).program.files
        text = [line.rstrip() for file in files if not file.packaged for line in file.text.splitlines()]
        text = text or [file.name for file in files][:1]
    except Exception:
        text = ["rules that this version cannot read"]
    given = [f"{k} = {v}" for k, v in sorted((record.get("params") or {}).items())]
    return [line for line in (*text, *given, f"adapter {record.get('adapter')}") if line]
