"""`ModelTransform`: rules applied by a Lightning callback, at the one moment that is right for every strategy."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from hashlib import blake2b
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from ..lang.diagnostics import refusal
from ..patch.apply import apply_plan
from ..patch.over_ranks import over_ranks
from ..patch.patch import Patch, patches
from ..plan.plan import Plan, patterns
from ..plan.ruleset import RuleSet, load
from . import checks
from .adapters import write_adapters
from .atomic import AtomicIO
from .atomic_folder import write_whole_folders
from .base import Base, load_base
from .contents import Window, keep_what_changes
from .frozen import freeze_again, remember_frozen
from .handover import Handover
from .inner import inner_model, plan_inside
from .random_state import Randomness
from .sharded import check_before_loading

Rules = str | PathLike[str] | RuleSet | Callable[[nn.Module], Any]

_MARK = "_graphpatch_transforms"
"""In a module's `__dict__`: by the identity of a transform, the id of its patch (None where it left none)."""
_log = logging.getLogger("graphpatch")


class ModelTransform(pl.Callback):
    """Transforms the model when fit, validate, test or predict starts: once, and before anything depends on its shape.

    That is after the base's weights were loaded, by `base_checkpoint` or by the module itself in `__init__`, `setup` or
    `configure_model`, and before the strategy wraps or shards it, a checkpoint is restored, and the optimizer is made.
    From then on the checkpoints of the module hold what is trained, and not the base.

    >>> lora = LoRA(target_modules=["linear_qkv", "linear_proj"], dim=32)
    >>> trainer = Trainer(callbacks=[ModelTransform("lora.rules", params={"rank": 32})])

    `rules`: a file, a packaged name, a `RuleSet`, or any function that takes the model and changes it. None takes the
    module's attribute `model_transform`, as NeMo has it; if both are there they must mean the same, and act once.
    `params`: values of the file's params. `adapter`: the name of the adapter that it adds. `base_checkpoint`: weights
    to load first, a directory or file of safetensors, a Lightning or torch checkpoint, or a function that takes the
    module. `allow_import`: as for `graphpatch.apply`.

    A frozen module's dropout and batch norm behave as its mode says: `model.eval()` before fit is kept by Lightning,
    and only where it was called.
    """

    def __init__(
        self,
        rules: Rules | None = None,
        params: dict[str, Any] | None = None,
        base_checkpoint: Base | None = None,
        adapter: str | None = None,
        *,
        adapter_directory: bool | Literal["peft"] = False,
        allow_import: str | Sequence[str] = (),
    ):
        self.rules, self.params, self.adapter = rules, dict(params or {}), adapter
        self.base_checkpoint, self.allow_import = base_checkpoint, allow_import
        self.adapter_directory = adapter_directory
        self._plan_text = ""
        self._handover = Handover()
        self._window: Window | None = None

    @property
    def state_key(self) -> str:
        return f"graphpatch.{type(self).__name__}" + (f".{self.adapter}" if self.adapter else "")

    # ── what it does to a model ──
    def __call__(self, model: nn.Module) -> nn.Module:
        """Transform `model` now, if this transform has not yet; what NeMo's users call in `configure_model`, where that
        goes on to shard the model. Returns the model."""
        self.load_base(model)
        self.transform_once(model)
        remember_frozen(model)
        return model

    def load_base(self, model: nn.Module) -> None:
        """Load `base_checkpoint`, where the transform is still to come."""
        if self.base_checkpoint is not None and self.identity() not in _applied(model):
            load_base(model, self.base_checkpoint)

    def transform_once(self, model: nn.Module) -> nn.Module:
        """What calling it does, behind the loading of the base."""
        identity = self.identity()
        if identity not in _applied(model):
            mark(model, identity, self.apply(model))
        self._handover.take(model)
        return model

    def plan(self, model: nn.Module) -> Plan | None:
        """What it would do; None where it is a function, of which nobody can know."""
        rules = self.rule_set()
        return None if rules is None else plan_inside(rules, model, self.adapter, patterns(self.allow_import))

    def apply(self, model: nn.Module) -> Patch | None:
        inner = inner_model(model)
        parts = model if inner is None else inner
        whole = over_ranks(parts, "apply")
        rules = self.rule_set() if whole is not None else None
        if whole is not None and rules is not None:
            found = whole(parts, rules, adapter=self.adapter, allow_import=self.allow_import, tell=self._heard)
            return found[0] if isinstance(found, list) else found  # type: ignore[no-any-return]
        plan = self.plan(model)
        if plan is None:
            return by_function(self.rules, model)  # type: ignore[arg-type]
        self._plan_text = str(plan)
        for warning in plan.warnings:
            _log.warning(warning.render())
        assert plan.tree.modules is not None
        return apply_plan(plan, plan.tree.modules[0])

    def _heard(self, plan: Plan) -> None:
        self._plan_text = str(plan)

    def rule_set(self) -> RuleSet | None:
        """Its rules; None where they are a function. Raises `RuleError` for a file that cannot be read."""
        if self.rules is None:
            raise refusal(
                "GP801",
                f"{type(self).__name__} has no rules",
                'ModelTransform("lora.rules"), or another file or packaged name',
                "or set the attribute on the LightningModule: self.model_transform = LoRA(...)",
            )
        if isinstance(self.rules, RuleSet):
            if self.params:
                raise refusal("GP802", "a RuleSet has its params already", "graphpatch.load(file, rank=...)")
            return self.rules
        return load(self.rules, **self.params) if isinstance(self.rules, (str, PathLike)) else None

    @property
    def has_rules(self) -> bool:
        """Whether it says itself what to do."""
        return self.rules is not None

    def identity(self) -> str:
        """The same for transforms that do the same."""
        rules = self.rule_set()
        said = repr(self.rules) if rules is None else rules.to_json()
        return blake2b(json.dumps([said, self.adapter]).encode(), digest_size=8).hexdigest()

    # ── when ──
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        checks.refuse_mixed(trainer, pl_module)
        checks.refuse_strategy(trainer)
        checks.refuse_swallowed(pl_module)
        checks.refuse_other_callbacks(trainer, self, bool(_applied(pl_module)))
        beside = partial(write_adapters, pl_module, self.adapter_directory == "peft")
        companions = [beside] if self.adapter_directory else []
        write_whole_files(trainer, *companions)
        transform = self._agreed(pl_module)
        transform.identity()  # rules that cannot be read are told of before anything is built
        # `configure_model` is called after every setup and before anything wraps the model. A partial, since Lightning
        # looks through `functools.wraps` to see whether the method is overridden; and it pickles, and is copied whole.
        slot = pl_module.configure_model
        if all(known.args[0].state_key != transform.state_key for known in _ours(slot)):
            pl_module.configure_model = partial(_configure, transform, pl_module, slot)  # type: ignore[method-assign]
        if trainer.strategy.restore_checkpoint_after_setup:
            self._window = Window(pl_module)
            write_whole_folders(trainer.strategy, companions)
            check_before_loading(trainer.strategy)

    def _agreed(self, module: pl.LightningModule) -> ModelTransform:
        """The transform that is meant: this one, or the module's attribute `model_transform`."""
        given = getattr(module, "model_transform", None)
        if given is None:
            return self
        other = given if isinstance(given, ModelTransform) else ModelTransform(given, adapter=self.adapter)
        if not self.has_rules:
            other.base_checkpoint = other.base_checkpoint or self.base_checkpoint
            return other
        if other.identity() != self.identity():
            raise refusal(
                "GP803",
                "the module's model_transform and the callback's rules are two different transforms",
                "give one of them: LoRA(...) on the module and the same object in callbacks, as in NeMo",
                text=(f"the module has {other!r}, the callback is {self!r}",),
            )
        return self

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        checks.refuse_uncovered(trainer, pl_module)
        self._tell(trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._handover.give(pl_module, trainer.is_global_zero)
        self._close()
        ours = _ours(pl_module.__dict__.get("configure_model"))
        if ours:
            del pl_module.__dict__["configure_model"]
            original = ours[-1].args[2]
            if getattr(original, "__func__", None) is not type(pl_module).configure_model:
                pl_module.configure_model = original  # type: ignore[method-assign]

    @rank_zero_only
    def _tell(self, trainer: pl.Trainer) -> None:
        """The plan, for whoever looks at the run later."""
        if self._plan_text:
            _log.info("%s", self._plan_text)
            for logger in trainer.loggers:
                write_plan(logger, self._plan_text)

    # ── a resumed run is the run that was not stopped ──
    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close()

    on_validation_start = on_test_start = on_predict_start = on_sanity_check_start

    def _close(self) -> None:
        """Loading is over."""
        if self._window is not None:
            self._window.close()
            self._window = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close()
        if Randomness.of(pl_module).waiting is not None:
            checks.warn_of_replay(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        Randomness.of(pl_module).restore_mid_epoch()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.rules!r}{self.params or ''}>"


def _configure(transform: ModelTransform, module: pl.LightningModule, original: Callable[[], None]) -> None:
    """`configure_model`: the module's own, then the transform."""
    original()
    freeze_again(module)
    try:
        checks.refuse_sharded(module, bool(_applied(module)))
        transform.load_base(module)
        with keep_what_changes(module, transform.base_checkpoint):
            transform.transform_once(module)
        checks.refuse_meta(module)
        checks.refuse_idle(module.trainer, module)
    except Exception:
        # Lightning's clean-up moves the module to the CPU, and its error over the meta device would hide ours.
        if any(p.is_meta for p in (*module.parameters(), *module.buffers())):
            module.cpu = partial(_stay, module)  # type: ignore[method-assign, assignment]
        raise


def _stay(module: pl.LightningModule) -> pl.LightningModule:
    """`cpu`, once."""
    del module.__dict__["cpu"]
    return module


def _ours(slot: Any) -> list[partial[None]]:
    """The transforms that wait in a `configure_model`, the last one first."""
    found = []
    while isinstance(slot, partial) and slot.func is _configure:
        found.append(slot)
        slot = slot.args[2]
    return found


def mark(model: nn.Module, identity: str, patch: Patch | None) -> None:
    model.__dict__.setdefault(_MARK, {})[identity] = patch.id if patch else None


def _applied(model: nn.Module) -> set[str]:
    """The identities of the transforms whose patch is on the model, or in it."""
    here = {patch.id for patch in patches(model)}
    marks: list[Mapping[str, str | None]] = [m.__dict__[_MARK] for m in model.modules() if _MARK in m.__dict__]
    return {identity for held in marks for identity, patch in held.items() if patch is None or patch in here}


def by_function(function: Callable[[nn.Module], Any], model: nn.Module) -> Patch | None:
    """Let a function change the model; the patch that it left, if any."""
    before = patches(model)
    answer = function(model)
    if isinstance(answer, nn.Module) and answer is not model:
        raise refusal(
            "GP804",
            f"the transform returned another {type(answer).__name__}, and the trainer would go on with the old one",
            "change the model in place, and return it or nothing",
        )
    return next((patch for patch in patches(model) if patch not in before), None)


def write_whole_files(trainer: pl.Trainer, *companions: Callable[[Path], None]) -> None:
    """Checkpoints are written as a whole or not at all, unless the user has a way of writing them."""
    if type(trainer.strategy.checkpoint_io) in (TorchCheckpointIO, AtomicIO):
        trainer.strategy.checkpoint_io = AtomicIO(
            *companions, elsewhere=trainer.strategy.restore_checkpoint_after_setup
        )
    elif companions:
        raise refusal(
            "GP814",
            f"no adapter can be written beside what {type(trainer.strategy.checkpoint_io).__name__} writes",
            "leave out that CheckpointIO, or adapter_directory",
        )


def write_plan(logger: Any, text: str) -> None:
    """As text where the logger has such, else as a file beside its own."""
    add_text = getattr(logger.experiment, "add_text", None)
    if callable(add_text):
        add_text("graphpatch/plan", f"```\n{text}\n```")
    elif logger.log_dir:
        folder = Path(logger.log_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "plan.txt").write_text(text + "\n", "utf-8")
