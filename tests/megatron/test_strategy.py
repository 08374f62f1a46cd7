"""Lightning's trainer on megatron-core's engine: NeMo's usage, the losses of one process, and resuming."""

from __future__ import annotations

import os
import signal
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

import graphpatch
from graphpatch.lightning import LoRA, MegatronStrategy, ModelTransform, ResumableDataLoader, last_whole

from .models import BATCH, LENGTH, VOCABULARY, fill, gathered, global_name
from .pool import RankFailed, one, ranks
from .training import built, chunks_of


class Model(pl.LightningModule):
    def __init__(self, model_transform: Any = None, **options: Any):
        super().__init__()
        self.model_transform, self.options, self.losses = model_transform, options, []
        self.model: Any = None

    def configure_model(self) -> None:
        if self.model is None:
            chunks = chunks_of(**self.options)
            self.model = nn.ModuleList(chunks) if len(chunks) > 1 else chunks[0]

    def forward_step(self, model: nn.Module, batch: Any) -> Any:
        ids, labels = batch
        output = model(ids, torch.arange(LENGTH).expand(len(ids), LENGTH), None, labels=labels)
        return output, lambda output: output.float().mean()

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        loss = self.trainer.strategy.run(batch, self.forward_step)  # type: ignore[attr-defined]
        self.losses.append(float(loss))
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val", self.trainer.strategy.run(batch, self.forward_step))  # type: ignore[attr-defined]

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], 2e-3, eps=1e-4, weight_decay=0)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


def data() -> Any:
    ids = torch.randint(VOCABULARY, (8 * BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(3))
    return torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(ids[:, :-1], ids[:, 1:]),
        batch_size=2 * BATCH // torch.distributed.get_world_size() if data.replicas else 2 * BATCH,
    )


data.replicas = False  # type: ignore[attr-defined]


def trainer(folder: str, layout: dict[str, Any], *callbacks: Any, epochs: int = 1, **options: Any) -> pl.Trainer:
    world = torch.distributed.get_world_size()
    rank = str(torch.distributed.get_rank())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    os.environ |= {"GROUP_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    strategy = MegatronStrategy(
        layout.get("tp", 1),
        layout.get("pp", 1),
        layout.get("vpp"),
        sequence_parallel=options.pop("sequence_parallel", False),
        num_microbatches=2,
    )
    return pl.Trainer(
        accelerator="cpu",
        devices=world,
        strategy=strategy,
        plugins=[TorchElasticEnvironment()],
        callbacks=list(callbacks),
        max_epochs=epochs,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def lora(**options: Any) -> LoRA:
    return LoRA(target_modules=["linear_qkv", "linear_proj"], dim=4, dropout=0.0, **options)


class Filled(LoRA):
    """With factors that depend on their global names alone, so that runs at any layout begin alike."""

    def apply(self, model: nn.Module) -> Any:
        patch = super().apply(model)
        for chunk in model.modules():
            if type(chunk).__name__.endswith("GPTModel"):
                fill(chunk, lambda name: "lora" in name)
        return patch


def fitted(folder: str, layout: dict[str, Any], epochs: int = 1, path: str | None = None, **options: Any) -> Any:
    data.replicas = layout.get("dp", 1) > 1  # type: ignore[attr-defined]
    transform = Filled(["linear_qkv", "linear_proj"], dim=4)
    sequence = options.pop("sequence_parallel", False)
    model = Model(transform, sequence_parallel=sequence)
    saver = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    t = trainer(folder, layout, transform, saver, epochs=epochs, sequence_parallel=sequence)
    t.fit(model, data(), ckpt_path=path)
    chunks = list(model.model) if isinstance(model.model, nn.ModuleList) else [model.model]
    factors = {
        global_name(chunk, n): gathered(p, p.data)
        for chunk in chunks
        for n, p in chunk.named_parameters()
        if p.requires_grad
    }
    return model.losses, factors


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Any:
    return one(fitted, str(tmp_path_factory.mktemp("alone")), {}, 2)


@pytest.mark.parametrize(
    ("layout", "sequence_parallel"),
    [({"tp": 2}, False), ({"tp": 2}, True), ({"pp": 2}, False), ({"pp": 2, "vpp": 2}, False), ({"dp": 2}, False)],
    ids=str,
)
def test_the_losses_are_those_of_one_process(tmp_path, alone, layout, sequence_parallel):
    case = parallel if sequence_parallel else fitted
    for losses, factors in ranks(case, str(tmp_path), layout, 2, **layout):
        torch.testing.assert_close(losses, alone[0], rtol=0, atol=1e-5)
        assert factors and all("lora" in name for name in factors)
        for name, value in factors.items():
            torch.testing.assert_close(value, alone[1][name], rtol=0, atol=1e-5)


def validated(folder: str) -> tuple[float, float]:
    """The loss over all batches, by the trainer and by hand."""
    adapter = Filled(["linear_qkv", "linear_proj"], dim=4)
    t = trainer(folder, {}, adapter)
    t.validate(Model(adapter), data(), verbose=False)
    (chunk,) = built(adapter.text)
    positions = torch.arange(LENGTH).expand(2 * BATCH, LENGTH)
    losses = [chunk(ids, positions, None, labels=labels).float().mean().detach() for ids, labels in data()]
    return float(t.callback_metrics["val"]), float(sum(losses) / len(losses))


def test_the_loss_is_the_mean_over_a_batch(tmp_path):
    by_trainer, by_hand = one(validated, str(tmp_path))
    torch.testing.assert_close(by_trainer, by_hand, rtol=0, atol=1e-5)


def parallel(folder: str, layout: dict[str, Any], epochs: int) -> Any:
    return fitted(folder, layout, epochs, sequence_parallel=True)


def resumed(folder: str, path: str, layout: dict[str, Any]) -> Any:
    return fitted(folder, layout, 2, path)


@pytest.mark.parametrize(
    ("first", "second"), [({"tp": 2}, {"tp": 2}), ({"tp": 2}, {}), ({}, {"tp": 2}), ({"pp": 2}, {"tp": 2})], ids=str
)
def test_a_run_goes_on_at_this_layout_and_at_another(tmp_path, alone, first, second):
    ranks(fitted, str(tmp_path / "first"), first, 1, **first)
    path = tmp_path / "first" / "epoch=0.ckpt"
    held = torch.load(path / "meta.pt", weights_only=True)
    assert held["state_dict"] == {} and held["graphpatch"]["patches"]
    for losses, factors in ranks(resumed, str(tmp_path / "second"), str(path), second, **second):
        torch.testing.assert_close(losses, alone[0][4:], rtol=0, atol=1e-5)
        for name, value in factors.items():
            torch.testing.assert_close(value, alone[1][name], rtol=0, atol=1e-5)


class Killed(pl.Callback):
    """One rank dies in the middle of an epoch, while the others go on."""

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 7 and torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGKILL)


def noisy(folder: str, layout: dict[str, Any], kill: bool = False, resume: bool = False) -> Any:
    """Two epochs of four batches, saved after the third and the sixth, with dropout before the factors."""
    data.replicas = False  # type: ignore[attr-defined]
    transform = Filled(["linear_qkv", "linear_proj"], dim=4, dropout=0.3)
    model = Model(transform, sequence_parallel=True)
    saver = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=3)
    t = trainer(folder, layout, transform, saver, *[Killed()] * kill, epochs=2, sequence_parallel=True)
    torch.manual_seed(4)
    batches = ResumableDataLoader(data().dataset, batch_size=2 * BATCH, shuffle=True)
    t.fit(model, batches, ckpt_path=last_whole(folder) if resume else None)
    return t.global_step, model.losses, {n: p.data for n, p in model.named_parameters() if p.requires_grad}


def test_a_run_that_was_killed_goes_on_to_the_bit(tmp_path):
    layout = {"tp": 2}
    whole = ranks(noisy, str(tmp_path / "whole"), layout, **layout)
    with pytest.raises(RankFailed, match="died without a word"):
        ranks(noisy, str(tmp_path / "killed"), layout, True, **layout)
    assert last_whole(tmp_path / "killed") is not None
    resumed = ranks(noisy, str(tmp_path / "killed"), layout, False, True, **layout)
    for (steps, losses, factors), (_, all_losses, wanted) in zip(resumed, whole):
        assert steps == 8 and losses == all_losses[6:]
        assert all(torch.equal(factors[name], value) for name, value in wanted.items())


def nemo(folder: str) -> Any:
    adapter = lora()
    model = Model(adapter)
    t = trainer(folder, {"tp": 2}, adapter)
    t.validate(model, data(), verbose=False)
    t.fit(model, data())
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    t.validate(model, data(), verbose=False)
    return trained, len(graphpatch.patches(model.model)), float(t.callback_metrics["val"])


def test_nemo_usage(tmp_path):
    (names, count, val), (_, _, other) = ranks(nemo, str(tmp_path), tp=2)
    assert count == 1 and len(names) == 4 * 2 * 2 and all(".lora_" in name for name in names)
    assert val == other


def beside(folder: str, layout: dict[str, Any]) -> dict[str, torch.Tensor]:
    transform = lora()
    transform.adapter_directory = True
    model = Model(transform)
    saver = ModelCheckpoint(folder, filename="kept")
    trainer(folder, layout, transform, saver).fit(model, data())
    chunks = model.model if isinstance(model.model, nn.ModuleList) else [model.model]
    return {
        global_name(chunk, name): gathered(parameter, parameter.data)
        for chunk in chunks
        for name, parameter in chunk.named_parameters()
        if ".lora_" in name
    }


def read(folder: str) -> dict[str, torch.Tensor]:
    (chunk,) = chunks_of()
    graphpatch.load_adapter(chunk, f"{folder}/kept.adapter")
    return {name: p.data for name, p in chunk.named_parameters() if ".lora_" in name}


@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 2, "vpp": 2}], ids=str)
def test_an_adapter_that_one_process_reads_stands_beside_each_checkpoint(tmp_path, layout):
    trained: dict[str, torch.Tensor] = {}
    for part in ranks(beside, str(tmp_path), layout, **layout):
        trained |= part
    found = one(read, str(tmp_path))
    assert found.keys() == trained.keys()
    assert all(torch.equal(value, trained[name]) for name, value in found.items())
    assert any(bool(value.count_nonzero()) for name, value in found.items() if name.endswith("lora_B"))


def wrongly(folder: str, kind: str) -> Any:
    transform: Any = lora()
    options: dict[str, Any] = {}
    model = Model(transform)
    if kind == "sizes":
        options["sequence_parallel"] = True
    if kind == "accumulate":
        options["accumulate_grad_batches"] = 2
    if kind == "optimizer":
        model.configure_optimizers = lambda: torch.optim.Adagrad(  # type: ignore[method-assign]
            p for p in model.parameters() if p.requires_grad
        )
    if kind == "rules":
        transform = model.model_transform = ModelTransform(
            graphpatch.parse(f"patch linear_qkv with lora(rank={2 + torch.distributed.get_rank()})")
        )
    try:
        trainer(folder, {"tp": 2}, transform, **options).fit(model, data())
    except graphpatch.Error as error:
        return error.code
    return None


@pytest.mark.parametrize(
    ("kind", "code"), [("sizes", "GP934"), ("accumulate", "GP935"), ("optimizer", "GP933"), ("rules", "GP931")]
)
def test_what_is_wrong_is_told_on_all_ranks(tmp_path, kind, code):
    assert ranks(wrongly, str(tmp_path), kind, tp=2) == [code, code]
