"""An adapter, written for one reader: in its format, and held against the table before it is there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from os import PathLike, fspath
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from ...lang.diagnostics import Diagnostic, Error
from ...patch.over_ranks import OVER_RANKS
from ...patch.patch import Patch
from ...plan.rules import maps_in_force
from ...plan.ruleset import RuleSet, load
from ...plan.scope import World
from ...tree.tree import Tree
from ..moved import brought
from ..peft.export import written as peft_files
from ..peft.mapped import mapped
from ..save import original_plan
from ..saved import Saved
from ..tensors import added_tensors, copied_out, journal_of, moved_tensors
from .adapter import Adapter, Layout
from .deltas import deltas_of
from .diffusers import for_diffusers
from .folder import check_folder, write_folder
from .mlx import for_mlx
from .of_peft import deltas_of_peft
from .portable import Written, portable
from .sglang import for_sglang
from .table import STACKED
from .validate import Report, readers_of, validate_adapter

LAYOUTS: Mapping[str, Layout] = {"mlx": "mlx", "diffusers": "diffusers"}
"""What a reader reads, where that is not PEFT's."""
Profile = Literal["peft", "portable"]
_ANY_RANK = 1 << 30
"""How high a rank a server takes is said when it is started, not when an adapter is written."""


def export_adapter(
    directory: str | PathLike[str],
    out: str | PathLike[str],
    reader: str,
    *,
    profile: Profile | None = None,
    model: Any = None,
    base: str | None = None,
    part: str | None = None,
    maps: RuleSet | str | PathLike[str] | None = None,
) -> Report:
    """Write the adapter in `directory` to the folder `out` as `reader` reads it, and say what it will make of it.

    `directory` is one of `save_adapter`, which needs no model, or an adapter in PEFT's format, whose base `model` is (a
    module or a `Tree`). Where `model` is given, what is written is held against that. `base` is the name of the base,
    for servers that ask for it; `part` the part of a pipeline, for diffusers. Where the adapter's rules have `map`
    statements in force, or those of the rule file `maps` are given, it is written for the model that these read: of a
    GPTModel of megatron-core, for the Hugging Face model. The profile is "portable" where none is
    given; "peft" for PEFT itself, and for vLLM and a model whose experts it keeps in stacks.

    Nothing is written where the reader would refuse or misread it. Raises `Error`: GP635 for what it has no form for,
    GP636 where `out` holds a model or another adapter, GP637 for what it would refuse, GP639 for an argument that is
    missing or has no effect, GP952 for maps that say nothing of a module, and those of reading (GP601 to GP614, GP631),
    writing (GP604) and PEFT's profile (GP625).
    """
    name, *others = readers_of(reader)
    layout = LAYOUTS.get(name, "peft")
    if others:
        raise _argument("an adapter is written for one reader at a time", f"first for {name}")
    if profile not in (None, "peft", "portable"):
        raise _argument(f"there is no profile called {profile!r}", "peft or portable")
    if part is not None and layout != "diffusers":
        raise _argument(f"part has no effect for {name}", "it says where in a pipeline of diffusers an adapter belongs")
    if layout != "peft" and profile == "peft":
        raise _argument(f"{name} does not read PEFT's format", "leave the profile out")
    if layout == "diffusers" and base is not None:
        raise _argument("base has no effect for diffusers", "its files do not say what they were made on")
    folder = Path(out)
    check_folder(folder, layout)
    written, tree = _written(directory, model, profile, name, base, maps)
    metadata = {"format": "pt"}
    if layout == "mlx":
        assert tree is not None
        written = for_mlx(written, tree)
    elif name == "sglang":
        written = for_sglang(written)
    elif layout == "diffusers":
        assert tree is not None
        written, said = for_diffusers(written, tree, part)
        metadata = {"lora_adapter_metadata": said}  # alone, since several entries are written in any order
    reports: list[Report] = []

    def look(place: Path) -> None:
        reports.append(validate_adapter(place, tree if model is None else model, name, max_rank=_ANY_RANK))
        if not reports[0].clean:
            told = Diagnostic("GP637", f"{name} would not read this adapter as it was trained: it was not written")
            raise Error([told, *reports[0].diagnostics])

    write_folder(folder, layout, None if layout == "diffusers" else written.config, written.tensors, metadata, look)
    return replace(reports[0], adapter=replace(reports[0].adapter, folder=fspath(folder)))


def write_portable(patch: Patch, directory: str | PathLike[str], base: str | None = None) -> None:
    """Write a patch's adapter in PEFT's format, as every reader understands it alike: see `portable.py`.

    Raises `Error`: GP635 for what cannot be so expressed, with who refuses it; GP636, GP604 for the folder;
    `ApplyError` (GP509) where the patch was reverted or is switched off.
    """
    journal_of(patch)
    folder = Path(directory)
    check_folder(folder, "peft")
    plan, added = original_plan(patch), added_tensors(patch)
    moved = moved_tensors(plan, patch.model, added, brought(patch))
    written = portable(deltas_of(plan, copied_out(added), list(moved)), plan.tree, base)
    write_folder(folder, "peft", written.config, written.tensors, {"format": "pt"}, lambda place: None)


def _written(
    directory: str | PathLike[str],
    model: Any,
    profile: Profile | None,
    reader: str,
    base: str | None,
    maps: RuleSet | str | PathLike[str] | None,
) -> tuple[Written, Tree | None]:
    """The adapter in PEFT's format, by the profile, and the tree of its base, where that is known."""
    adapter = Adapter.read(directory)
    if adapter.layout == "graphpatch":
        saved = Saved.read(directory)
        tree, said, tensors = saved.made_on, saved.manifest.tensors, saved.tensors
        plan = saved.plan(tree, saved.manifest.adapter, ())
        saved.check_changes(plan)
        added, moved = ({key: tensors[key] for key in keys} for keys in (said.added, said.base))
        rules = saved.rules if maps is None else maps if isinstance(maps, RuleSet) else load(maps)
        world = World(rules.program, tree)
        own = reader in ("peft", "unsloth")
        if maps is not None or maps_in_force(world) or _of_megatron(tree):
            theirs = Written(*mapped(plan, added, moved, world, base))
            if profile == "peft" or (profile is None and own):
                return theirs, None if model is None else _tree(model)
            with TemporaryDirectory() as folder:
                write_folder(Path(folder), "peft", theirs.config, theirs.tensors, {"format": "pt"}, lambda place: None)
                return _of_peft(Adapter.read(folder), model, base)
        own = own or (reader == "vllm" and _in_stacks(tree))
        if profile == "peft" or (profile is None and own):
            return Written(*peft_files(plan, added, moved, base)), tree
        return portable(deltas_of(plan, tensors, said.base), tree, base), tree
    if maps is not None:
        raise _argument(f"maps have no effect on {adapter.folder}", "they are for what save_adapter wrote")
    if adapter.layout != "peft":
        title = f"{adapter.folder} is an adapter as {adapter.layout} reads it"
        raise _argument(title, "export that which it was made of")
    if profile == "peft":
        raise _argument(f"{adapter.folder} is in PEFT's format already", "the profile portable writes it anew")
    return _of_peft(adapter, model, base)


def _of_peft(adapter: Adapter, model: Any, base: str | None) -> tuple[Written, Tree]:
    """As every reader understands it."""
    if model is None:
        raise _argument("an adapter in PEFT's format does not say what its base looks like", "--model M, or model=")
    tree = _tree(model)
    base = base or adapter.config.get("base_model_name_or_path")
    return portable(deltas_of_peft(adapter, tree), tree, base if isinstance(base, str) else None), tree


def _tree(model: Any) -> Tree:
    return model if isinstance(model, Tree) else Tree.of(model)


def _of_megatron(tree: Tree) -> bool:
    """Whether nobody else has modules of these names."""
    return not OVER_RANKS.keys().isdisjoint(tree.signature(0).mro)


def _in_stacks(tree: Tree) -> bool:
    return any(str(config.get("model_type", "")).startswith(STACKED) for config in tree.configs)


def _argument(title: str, fix: str) -> Error:
    return Error(Diagnostic("GP639", title, fixes=(fix,)))
