"""A transformed module from its checkpoint, and the base from its own."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar, cast

import lightning.pytorch as pl
import torch

from ..lang.diagnostics import refusal
from ..patch.apply import apply_plan
from ..plan.ruleset import RuleSet
from .atomic import telling_what_is_torn
from .base import Base, load_base
from .checks import refuse_meta
from .contents import KEY, check_loadable, keep_what_changes, named_as_here
from .inner import plan_inside
from .sharded import read_sharded

_Module = TypeVar("_Module", bound=pl.LightningModule)


def load_from_checkpoint(
    cls: type[_Module], path: str | PathLike[str], *, base: Base | None = None, **arguments: Any
) -> _Module:
    """`cls.load_from_checkpoint(path)` for a module that was transformed: the base first, then what trained on it.

    `path` is a file, or the folder of a sharded checkpoint. `base` is where the base's weights are (see
    `ModelTransform`); None where the module loads them itself. All other arguments are Lightning's, or `cls`'s own.
    Raises `ApplyError` as resuming does: GP830, GP832, GP834, GP821, and GP833 for what is not
    whole.
    """

    def on_load(module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        ours = checkpoint.get(KEY)
        if ours is None:
            raise refusal(
                "GP830", f"{path} was saved by a module that no transform had changed", "cls.load_from_checkpoint"
            )
        if base is not None:
            load_base(module, base)
        refuse_meta(module)
        with keep_what_changes(module, base):
            for record in ours["patches"]:
                rules = RuleSet.from_json(json.dumps(record["rules"]))
                plan = plan_inside(rules, module, record["adapter"], ())
                assert plan.tree.modules is not None
                apply_plan(plan, plan.tree.modules[0], initialise=False)
        named_as_here(module, checkpoint)
        check_loadable(module, checkpoint)
        cls.on_load_checkpoint(cast(_Module, module), checkpoint)

    if Path(path).is_dir():
        with TemporaryDirectory() as folder:
            whole = Path(folder) / "whole.ckpt"
            torch.save(read_sharded(Path(path)), whole)
            return load_from_checkpoint(cls, whole, base=base, **arguments)

    # Lightning makes the module, and asks it before it loads: a subclass for this one moment answers.
    answering: Any = type(cls.__name__, (cls,), {"__module__": cls.__module__, "on_load_checkpoint": on_load})
    with telling_what_is_torn(path):
        module = answering.load_from_checkpoint(path, **arguments)
    module.__class__ = cls
    return cast(_Module, module)
