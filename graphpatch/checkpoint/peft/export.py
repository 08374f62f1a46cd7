"""A patch's adapter as PEFT writes one."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch

from ...lang.diagnostics import Diagnostic, Error
from ...ops.lora import Lora
from ...patch.original import original_plan
from ...patch.over_ranks import over_ranks, parts
from ...patch.patch import Patch
from ...plan.plan import Plan
from ...tree.tree import Tree
from ..moved import brought
from ..tensors import Named, added_tensors, copied_out, journal_of, moved_tensors
from .config import config_of
from .files import write_files
from .keys import Adapted, adapted, peft_key
from .matching import named_by, parameter_targets, saved_modules, targets, value_of
from .moe import is_renamed
from .naming import commonest, ends, patterns
from .plain import Plain, inexpressible, plain
from .saved import Saved, saved_with


def to_peft(
    patch: Patch | Sequence[Patch], directory: str | PathLike[str], *, profile: Literal["peft", "portable"] = "peft"
) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` into `directory`, which PEFT 0.21 loads as it stands.

    The adapter is LoRA (or DoRA) on the base as it was before the patch; base weights that trained with it are
    `modules_to_save`, or biases. PiSSA's and OLoRA's become plain LoRA of twice the rank. `target_modules` are the
    shortest names that reach, by PEFT's matching, exactly the modules that were patched, which is checked. The same
    patch gives the same bytes. What was there before is replaced, once both files are on the disk.

    With the profile "portable" it is what servers understand as PEFT does: see `readers/portable.py`. What cannot be so
    said is refused, with who refuses it (GP635), as is a folder with a model or another adapter in it (GP636).

    Raises `Error`: GP625 naming what PEFT cannot express, GP626 where no list of names reaches just these modules,
    GP604 where the files cannot be written, GP605 on the meta device.
    """
    first = parts(patch)[0]
    elsewhere = over_ranks(first.model, "to_peft")
    if elsewhere is not None:
        return elsewhere(patch, directory)  # type: ignore[no-any-return]
    patch = first
    if profile == "portable":
        from ..readers.export import write_portable

        return write_portable(patch, directory)
    if profile != "peft":
        fix = 'profile="peft", or "portable" for servers'
        raise Error(Diagnostic("GP625", f"there is no profile called {profile!r}", fixes=(fix,)))
    journal_of(patch)
    config, tensors = exported(patch)
    folder = Path(directory)
    if (folder / "config.json").exists() and not (folder / "adapter_config.json").exists():
        raise Error(
            Diagnostic(
                "GP629",
                f"{folder} holds a model, and an adapter must not stand beside one",
                text=("from_pretrained would load both: it looks for an adapter_config.json beside config.json",),
                fixes=("give the adapter a folder of its own",),
            )
        )
    write_files(folder, config, tensors)


def exported(patch: Patch) -> tuple[dict[str, Any], Named]:
    """The config and the tensors, by PEFT's keys, on the CPU."""
    plan = original_plan(patch)
    added = added_tensors(patch)
    moved = moved_tensors(plan, patch.model, added, brought(patch))
    name = getattr(getattr(patch.model, "config", None), "_name_or_path", None)
    return written(plan, added, moved, name if isinstance(name, str) and name else None)


def written(
    plan: Plan, added: Mapping[str, torch.Tensor], moved: Named, base: str | None
) -> tuple[dict[str, Any], Named]:
    """The same of an adapter whose plan and tensors these are, by their names in the model; `base` is the base's."""
    found = _Export(plan, [plain(one, _of(one, added)) for one in _targets(plan)])
    config = found.config(saved_with(plan, found.adapted, moved))
    named = {**config.base, **{peft_key_of(one, tail): t for one in found.parts for tail, t in one.tensors.items()}}
    config.fields["base_model_name_or_path"] = base
    return config.fields, copied_out(dict(sorted(named.items())))


def peft_key_of(one: Plain, tail: str) -> str:
    return peft_key(one.target.path + ".base_layer" * one.target.depth, tail)


def _of(one: Adapted, added: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: added[ours] for name, ours in one.names.items()}


def _targets(plan: Plan) -> list[Adapted]:
    """All targets; raises `Error` (GP625) where the patch does something else too, or nothing of this."""
    for step in plan.steps:
        if step.represents:
            continue  # how the base is kept is no affair of its adapter
        if not isinstance(step.op, Lora):
            raise inexpressible(plan.tree.paths[step.nodes[0]] or "^", f"PEFT knows nothing like {step.op.text()}")
    found = adapted(plan)
    if not found:
        raise Error(Diagnostic("GP625", "this patch adds no LoRA, and an adapter of PEFT is one"))
    seen: dict[str, Adapted] = {}
    for one in found:
        if seen.setdefault(one.name, one) is not one:
            raise inexpressible(
                one.name,
                f"it carries two adapters, {one.op.text()} and {seen[one.name].op.text()}; a folder of PEFT holds one",
                "apply them as two patches, and write each to a folder of its own",
            )
    return found


@dataclass
class _Config:
    fields: dict[str, Any]
    base: Named
    """Tensors of the base, by PEFT's keys."""


@dataclass
class _Export:
    plan: Plan
    parts: list[Plain]
    warned: list[str] = field(default_factory=list)

    @property
    def adapted(self) -> list[Adapted]:
        return [part.target for part in self.parts]

    def config(self, saved: Saved) -> _Config:
        use_dora, lora_bias = self._dora(), self._bias()
        rslora = all(part.target.op.use_rslora for part in self.parts)
        modules, parameters = self._named()
        ranks = {name: part.rank for name, part in (modules | parameters).items()}
        alphas = {name: _number(part.alpha(rslora)) for name, part in (modules | parameters).items()}
        rank, alpha = commonest(ranks.values()), commonest(alphas.values())
        names = [path for path in self.plan.tree.paths if path]
        by_name, excluded = self._entries(list(modules), names)
        fields: dict[str, Any] = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM" if re.search("ForCausalLM$|LMHeadModel$", self.plan.tree.title) else None,
            "inference_mode": True,
            "r": rank,
            "lora_alpha": alpha,
            "lora_dropout": self._dropout(bool(parameters)),
            "target_modules": by_name,
            "rank_pattern": patterns(ranks, rank),
            "alpha_pattern": patterns(alphas, alpha),
            "bias": saved.bias,
            "fan_in_fan_out": all("transformers.pytorch_utils.Conv1D" in p.target.signature.mro for p in self.parts),
            "init_lora_weights": True,
            "modules_to_save": saved.modules or None,
            "use_rslora": rslora,
            "use_dora": use_dora,
            "layers_to_transform": None,
            "layers_pattern": None,
            "revision": None,
        }
        if excluded:
            fields["exclude_modules"] = excluded
        if parameters:
            fields["target_parameters"] = self._parameter_entries(list(parameters))
        if lora_bias:
            fields["lora_bias"] = True
        if any(part.target.op.tied for part in self.parts):
            fields["ensure_weight_tying"] = True  # PEFT then trains both as one
        self._verify(fields, modules, parameters, saved)
        for text in self.warned:
            warnings.warn(text, stacklevel=5)
        return _Config(fields, saved.tensors)

    # ── what PEFT has once for all targets ──
    def _dora(self) -> bool:
        without = [part for part in self.parts if not part.dora]
        if without and len(without) < len(self.parts):
            raise inexpressible(
                without[0].target.name, "PEFT has DoRA on all targets or on none, and here some have it"
            )
        return not without

    def _bias(self) -> bool:
        """PEFT's B has a bias on all targets or on none: those that have none get zeros."""
        if not any(part.bias for part in self.parts):
            return False
        for part in self.parts:
            if part.target.kind not in ("linear", "convolution"):
                raise inexpressible(part.target.name, "others have a bias on B, which PEFT then wants of all targets")
            if not part.bias:
                b = part.tensors["lora_B.weight"]
                part.tensors["lora_B.bias"] = b.new_zeros(b.shape[0])
        return True

    def _dropout(self, parameters: bool) -> float:
        rates = [part.target.op.dropout for part in self.parts]
        rate = 0.0 if parameters else commonest(rates)
        if any(other != rate for other in rates):
            why = "takes none where it adapts parameters" if parameters else "has one for all"
            self.warned.append(f"graphpatch: PEFT {why}: dropout is written as {rate}. It matters if PEFT trains on.")
        return rate

    # ── names ──
    def _named(self) -> tuple[dict[str, Plain], dict[str, Plain]]:
        """Targets by what names them: modules, and parameters."""
        kind = (self.plan.tree.config_of(0) or {}).get("model_type")
        modules, parameters = {}, {}
        for part in self.parts:
            one = part.target
            if one.parameter is not None:
                parameters[one.name] = part
            elif is_renamed(kind, one.path):
                if part.dora or part.bias or one.kind != "linear" or one.depth:
                    raise inexpressible(one.path, f"in {kind} PEFT takes it for an expert (huggingface/peft#3711)")
                parameters[f"{one.path}.weight"] = part
            else:
                modules[one.path] = part
        if parameters and any(part.dora for part in self.parts):
            raise inexpressible(next(iter(parameters)), "PEFT has no DoRA on parameters")
        return modules, parameters

    def _entries(self, wanted: Sequence[str], names: Sequence[str]) -> tuple[list[str], list[str] | str]:
        if "" in wanted:
            raise inexpressible("^", "PEFT gives the root of a model no adapter", "wrap it: nn.Sequential(model)")
        found = ends(wanted, names)
        # A list if it excludes nothing that is meant, since not all who read configs know regexes.
        listed = not any(named_by(found.beyond, name) for name in wanted)
        return found.entries, found.beyond if listed else "|".join(map(re.escape, found.beyond))

    def _parameter_entries(self, wanted: Sequence[str]) -> list[str]:
        found = ends(wanted, _parameters(self.plan.tree))
        if found.beyond:
            raise _over_matched(found.beyond[0], "target_parameters")
        return found.entries

    def _verify(
        self, fields: Mapping[str, Any], modules: Mapping[str, Plain], parameters: Mapping[str, Plain], saved: Saved
    ) -> None:
        """Hold the config against the model, by PEFT's matching."""
        tree = self.plan.tree
        config = config_of(fields, "the config")
        reached = targets(config, [path for path in tree.paths if path])
        odd = set(reached) ^ set(modules)
        if odd:
            raise _over_matched(sorted(odd)[0], "target_modules")
        odd = set(parameter_targets(config, _parameters(tree))) ^ set(parameters)
        if odd:
            raise _over_matched(sorted(odd)[0], "target_parameters")
        for name, part in (dict(modules) | dict(parameters)).items():
            rank = value_of(config.rank_pattern, name, config.r)
            alpha = value_of(config.alpha_pattern, name, config.lora_alpha)
            assert rank == part.rank and alpha == part.alpha(config.use_rslora), name
        assert set(saved_modules(config, tree.paths)) <= set(saved.paths), saved.modules


def _number(value: float) -> float:
    return int(value) if float(value).is_integer() else value


def _parameters(tree: Tree) -> list[str]:
    """All names of parameters, as PEFT asks for them: module by module."""
    return [
        f"{path}.{name}" for node, path in enumerate(tree.paths) if path for name in tree.signature(node).parameters
    ]


def _over_matched(name: str, field: str) -> Error:
    return Error(
        Diagnostic(
            "GP626",
            f"`{name}` cannot be told apart in `{field}` of PEFT",
            text=("its lists match names by their ends, and another module's name ends in one of these",),
        )
    )
