"""Beside the callback itself: Fabric, the command line of Lightning, loggers, averaged weights, adapter directories."""

from __future__ import annotations

import copy
from typing import Any

import lightning
import peft
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    EarlyStopping,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from transformers import LlamaConfig, LlamaForCausalLM

import graphpatch
from graphpatch.lightning import LoRA, ModelTransform, load_from_checkpoint, transform

from .common import Module, data, factors, trainer
from .test_checkpoints import RULES, lora


class Language(lightning.LightningModule):
    """A Hugging Face model inside a LightningModule, as most people have it."""

    def __init__(self, checkpointing: bool = False):
        super().__init__()
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
            vocab_size=32,
        )  # fmt: skip
        self.model = LlamaForCausalLM(config)
        if checkpointing:
            self.model.gradient_checkpointing_enable()
        self.losses: list[float] = []

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        loss = self.model(input_ids=batch, labels=batch).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.01)


def sentences() -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(torch.arange(160).reshape(20, 8) % 32, batch_size=5)


def test_the_default_is_every_linear_of_a_layer_and_an_adapter_stands_beside_each_checkpoint(tmp_path):
    for kind in (True, "peft"):
        module, callback = Language(), LoRA(dim=4, alpha=8)
        callback.adapter_directory = kind  # type: ignore[assignment]
        folder = tmp_path / str(kind)
        saver = ModelCheckpoint(folder, save_last=True, save_top_k=1, monitor="step", mode="max")
        base = copy.deepcopy(module.model).eval()
        trainer(tmp_path, callback, saver, enable_checkpointing=True, max_epochs=3).fit(module, sentences())
        assert len(factors(module)) == 2 * 7 * 2
        assert len(list(folder.glob("*.adapter"))) == len(list(folder.glob("*.ckpt"))) == 2
        x = torch.arange(16).reshape(2, 8)
        expected = module.eval().model(x).logits
        if kind == "peft":
            other = peft.PeftModel.from_pretrained(base, str(folder / "last.adapter"))
        else:
            graphpatch.load_adapter(base, folder / "last.adapter")
            other = base
        assert torch.allclose(other(x).logits, expected, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_the_adapter_under_activation_checkpointing_with_a_frozen_base(tmp_path, checkpointing):
    modules = [Language(), Language(checkpointing)]
    for module in modules:
        torch.manual_seed(1)
        trainer(tmp_path, LoRA(dim=4), max_epochs=1).fit(module, sentences())
    assert modules[0].losses == modules[1].losses and modules[1].losses[-1] < modules[1].losses[0]


def test_rules_that_speak_of_the_module_and_rules_that_speak_of_the_model(tmp_path):
    for text in ("patch ^net.layers[0].linear_qkv with lora(rank=2)", "patch ^layers[0].linear_qkv with lora(rank=2)"):
        module = Module()
        saver = ModelCheckpoint(tmp_path / text[7:10].strip("^."), save_last=True)
        callback = ModelTransform(graphpatch.parse(f"{text}\nfreeze ** except @new"))
        trainer(tmp_path, callback, saver, enable_checkpointing=True, max_epochs=1).fit(module, data())
        assert factors(module) == ["net.layers.0.linear_qkv.lora_A", "net.layers.0.linear_qkv.lora_B"]
        assert factors(load_from_checkpoint(Module, saver.last_model_path)) == factors(module)


def test_the_plan_is_in_the_logger_s_folder(tmp_path):
    logger = CSVLogger(tmp_path)
    trainer(tmp_path, lora(), logger=logger).fit(Module(), data())
    text = (tmp_path / "lightning_logs" / "version_0" / "plan.txt").read_text()
    assert "^layers[0:2].linear_" in text and "4 to rewrite" in text


def test_the_plan_is_a_text_in_tensorboard_once_a_run(tmp_path):
    logger, module, callback = TensorBoardLogger(tmp_path), Module(), lora()
    trainer(tmp_path, callback, logger=logger).fit(module, data())
    trainer(tmp_path, callback, logger=False).validate(module, data())
    logger.experiment.flush()
    (events,) = tmp_path.rglob("events.*")
    written = events.read_bytes()
    assert written.count(b"graphpatch/plan") == 1 and b"^layers[0:2].linear_" in written


@pytest.mark.parametrize("save_last", [True, "link"])
def test_the_last_checkpoint_may_be_a_link(tmp_path, save_last):
    saver = ModelCheckpoint(tmp_path, save_last=save_last, save_top_k=1, filename="{epoch}")
    first, second, whole = Module(), Module(), Module()
    torch.manual_seed(5)
    trainer(tmp_path, lora(), saver, enable_checkpointing=True).fit(first, data())
    last = tmp_path / "last.ckpt"
    assert last.is_symlink() == (save_last == "link")
    assert graphpatch.lightning.last_whole(tmp_path) is not None
    trainer(tmp_path, lora(), max_epochs=3).fit(second, data(), ckpt_path=last)
    torch.manual_seed(5)
    trainer(tmp_path, lora(), max_epochs=3).fit(whole, data())
    assert first.losses + second.losses == whole.losses


def test_averaged_weights_are_the_adapter_s(tmp_path):
    class Average(WeightAveraging):
        def should_update(self, step_idx=None, epoch_idx=None):
            return step_idx is not None

    with pytest.raises(graphpatch.Error, match="GP809"):
        trainer(tmp_path, Average(), lora()).fit(Module(), data())

    def fitted(epochs: int, path: Any = None, **options: Any) -> Module:
        torch.manual_seed(5)
        module, saver = Module(), ModelCheckpoint(tmp_path / str(epochs), save_last=True)
        callbacks = [lora(), Average(use_buffers=False), saver]
        trainer(tmp_path, *callbacks, max_epochs=epochs, enable_checkpointing=True).fit(module, data(), ckpt_path=path)
        return module

    whole, part = fitted(4), fitted(2)
    held = torch.load(tmp_path / "2" / "last.ckpt", weights_only=True)
    statistics = {"net.norm.running_mean", "net.norm.running_var", "net.norm.num_batches_tracked"}
    assert set(held["state_dict"]) == set(held["current_model_state"]) == {*factors(part), *statistics}
    assert any(not torch.equal(t, held["current_model_state"][n]) for n, t in held["state_dict"].items())
    resumed = fitted(4, tmp_path / "2" / "last.ckpt")
    assert part.losses + resumed.losses == whole.losses
    assert all(torch.equal(a, b) for a, b in zip(resumed.state_dict().values(), whole.state_dict().values()))


def test_other_callbacks_go_along(tmp_path):
    module, ours = Module(), lora()
    with pytest.raises(graphpatch.Error, match="transform it before"):
        trainer(tmp_path, ours, StochasticWeightAveraging(0.01)).fit(module, data())
    ours(module)
    callbacks = [ours, EarlyStopping("loss"), StochasticWeightAveraging(0.01, swa_epoch_start=1)]
    trainer(tmp_path, *callbacks, max_epochs=3).fit(module, data())
    assert len(factors(module)) == 8
    with pytest.raises(graphpatch.Error, match="GP807"):
        trainer(tmp_path, lora(), BackboneFinetuning()).fit(Module(), data())

    class Fails(Module):
        def on_train_epoch_end(self):
            raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        callbacks = [lora(), OnExceptionCheckpoint(tmp_path, "failed")]
        trainer(tmp_path, *callbacks, enable_checkpointing=True).fit(Fails(), data())
    held = torch.load(tmp_path / "failed.ckpt", weights_only=True)["state_dict"]
    assert set(factors(module)) <= set(held) and "net.layers.0.linear_qkv.weight" not in held


def test_lightning_cli_configures_the_callback(tmp_path):
    rules = tmp_path / "mine.rules"
    rules.write_text("param rank: int = 4\n" + RULES.replace("rank=2", "rank=$rank"))
    config = tmp_path / "config.yaml"
    config.write_text(
        f"""
trainer:
  accelerator: cpu
  max_epochs: 1
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: graphpatch.lightning.ModelTransform
      init_args: {{rules: {rules}, params: {{rank: 3}}}}
    - class_path: graphpatch.lightning.LoRA
      init_args: {{target_modules: [linear_qkv], dim: 2, adapter: other}}
"""
    )
    cli = LightningCLI(Module, run=False, args=["--config", str(config)], save_config_callback=None)
    cli.trainer.fit(cli.model, data())
    assert [p.shape[0] for n, p in cli.model.named_parameters() if "lora_A" in n] == [3, 2, 3, 3, 2, 3]
    config.write_text(config.read_text().replace("dim: 2", "dim: two"))
    with pytest.raises(SystemExit):
        LightningCLI(Module, run=False, args=["--config", str(config)], save_config_callback=None)


def test_fabric(tmp_path):
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    model = Module().net
    patch = transform(fabric, model, graphpatch.parse(RULES))
    optimizer = torch.optim.Adam(patch.trainable_parameters(), lr=0.1)
    ready, optimizer = fabric.setup(model, optimizer)
    x = next(iter(data()))[0]
    fabric.backward(ready(x).square().mean())
    optimizer.step()
    names = set(patch.adapter_state_dict())
    fabric.save(tmp_path / "adapter.ckpt", {"model": ready}, filter={"model": lambda name, _: name in names})
    held = torch.load(tmp_path / "adapter.ckpt", weights_only=True)["model"]
    assert set(held) == names and all(held[n].count_nonzero() for n in names if "lora_B" in n)
    with pytest.raises(graphpatch.Error, match="GP813"):
        transform(fabric, ready, graphpatch.parse(RULES))
