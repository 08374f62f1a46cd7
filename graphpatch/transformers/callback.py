"""The callback that a Trainer is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..checkpoint.intact import refuse_outgrown
from ..checkpoint.peft.export import exported
from ..checkpoint.tensors import added_tensors
from ..lang.diagnostics import Diagnostic, Error
from ..patch.drift import unwrapped
from ..patch.original import original_plan
from ..patch.patch import Patch, patches
from .adapter_only import attach, detach, end_admission
from .folder import write


class AdapterCheckpoint(TrainerCallback):
    """Checkpoints that hold the adapter of a patch, and resume exactly.

    ```python
    patch = graphpatch.apply(model, "lora.rules")
    trainer = Trainer(model, args, train_dataset=data, callbacks=[AdapterCheckpoint(patch)])
    trainer.train()
    ```

    From its making on, the model's `save_pretrained`, and so a Trainer's checkpoints, `trainer.save_model` and pushes
    to the hub, write `adapter.json` and `adapter.safetensors`, which `graphpatch.load_adapter` reads, and
    `model.safetensors`, from which a Trainer resumes: the adapter, and whatever else trains, a head for example. With
    `peft`, PEFT's files lie beside. A checkpoint made with other rules is refused with the difference. A quantised
    base is admitted to training. `patch.revert()` ends this, and so does `detach()`.

    Without `patch`, it is that of the model which the Trainer trains; so it also serves a `model_init`.

    Raises `Error`: GP651 where there is no such patch, or the model saves another; GP653 where the base is quantised
    in a way that passes no gradients; GP625 or GP626 where PEFT cannot express the patch. When training begins GP651
    where another model is trained, GP654 where it is sharded, GP655 where it was resized since it was patched, GP657
    where the patch is merged.
    """

    def __init__(self, patch: Patch | None = None, peft: bool = False):
        self.patch, self.peft, self._given = patch, peft, patch is not None
        if patch is not None:
            self._attach(patch)

    def detach(self) -> None:
        """Have the model save itself whole again, as without this callback."""
        if self.patch is not None and self.patch in patches(self.patch.model):
            detach(self.patch)

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        patch = self._patch_on(kwargs["model"])
        end_admission(patch)
        _refuse_sharded(args, patch)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        patch = self._patch_on(kwargs["model"])
        end_admission(patch)
        if patch.merged:
            raise Error(
                Diagnostic(
                    "GP657",
                    "the patch is merged into the weights, and its factors get no gradients",
                    fixes=("patch.unmerge() before training",),
                )
            )
        _refuse_sharded(args, patch)
        # Now, and not at the first save: what trains meanwhile would be lost.
        refuse_outgrown(patch, original_plan(patch), added_tensors(patch))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        patch = self._patch_on(kwargs["model"])
        # The Trainer wrote all of a model that has no `save_pretrained`, past anything a model can say.
        if not isinstance(patch.model, PreTrainedModel) and args.should_save and args.output_dir is not None:
            write(patch, Path(args.output_dir, f"checkpoint-{state.global_step}"), self.peft)

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Of a checkpoint the Trainer copies into the folder that it uploads only the files it knows.
        if args.should_save and args.output_dir is not None:
            write(self._patch_on(kwargs["model"]), args.output_dir, self.peft)

    # ── which patch ──
    def _patch_on(self, model: nn.Module) -> Patch:
        """The patch, if the model being trained is the one that it is on."""
        root = unwrapped(model)
        here = [patch for patch in patches(root) if patch.model is root]
        if self._given:
            if self.patch not in here:
                raise _error(
                    "the patch of this AdapterCheckpoint is not on the model that is trained",
                    "give it what graphpatch.apply(model, rules) returned for that very model",
                )
        elif self.patch not in here:
            if len(here) != 1:
                raise _error(
                    f"the model that is trained has {len(here)} patches, and AdapterCheckpoint() was given none",
                    "apply the rules first" if not here else "say which: AdapterCheckpoint(patch)",
                )
            self.patch = here[0]
            self._attach(self.patch)
        assert self.patch is not None
        return self.patch

    def _attach(self, patch: Patch) -> None:
        quantizer = getattr(patch.model, "hf_quantizer", None)
        if quantizer is not None and not quantizer.is_trainable:
            method = getattr(quantizer.quantization_config, "quant_method", type(quantizer).__name__)
            raise Error(
                Diagnostic(
                    "GP653",
                    f"a base quantised by {getattr(method, 'value', method)} in this way cannot be trained on",
                    text=("transformers says of it that gradients do not pass through it",),
                    fixes=("load it in a way that does: bitsandbytes, or torchao in 8 bits",),
                )
            )
        if self.peft:
            exported(patch)  # what PEFT cannot express is refused now, and not at the first checkpoint
        attach(patch, self.peft)


def _refuse_sharded(args: TrainingArguments, patch: Patch) -> None:
    how = None
    if args.fsdp:
        how = "FSDP"
    elif any(hasattr(p, "ds_id") for p in patch.model.parameters()):
        how = "ZeRO stage 3"
    elif any(hasattr(parameter, "full_tensor") for parameter in patch.model.parameters()):
        how = "DTensor"
    if how is not None:
        raise Error(
            Diagnostic(
                "GP654",
                f"AdapterCheckpoint cannot save what {how} has sharded",
                text=("a Trainer saves from one rank, and each has a part",),
                fixes=("leave the callback out, and call graphpatch.save_adapter(patch, folder) on every rank",),
            )
        )


def _error(title: str, fix: str) -> Error:
    return Error(Diagnostic("GP651", title, fixes=(fix,)))
