"""A small LightningModule, in the three ways in which one can be built, and a trainer that writes nothing."""

from __future__ import annotations

import os
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

SIZE = 8


class Layer(nn.Module):
    def __init__(self, dropout: float):
        super().__init__()
        self.linear_qkv = nn.Linear(SIZE, SIZE)
        self.linear_proj = nn.Linear(SIZE, SIZE)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.linear_proj(torch.tanh(self.drop(self.linear_qkv(x))))


class Net(nn.Module):
    def __init__(self, noise: bool = True):
        super().__init__()
        self.layers = nn.ModuleList(Layer(0.3 if noise else 0.0) for _ in range(2))
        self.norm = nn.BatchNorm1d(SIZE) if noise else nn.LayerNorm(SIZE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class Module(pl.LightningModule):
    """`built`: in "init", "setup" or "configure_model". Without `noise` the loss of a batch is the mean of its parts'."""

    def __init__(self, model_transform: Any = None, built: str = "init", noise: bool = True):
        super().__init__()
        self.model_transform, self.built, self.noise = model_transform, built, noise
        self.net: Any = None
        self.losses: list[float] = []
        if built == "init":
            self.build()

    def build(self) -> None:
        if self.net is None:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                self.net = Net(self.noise)

    def setup(self, stage: str) -> None:
        if self.built == "setup":
            self.build()

    def configure_model(self) -> None:
        if self.built == "configure_model":
            self.build()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        x, y = batch
        loss = nn.functional.mse_loss(self(x), y)
        self.losses.append(loss.item())
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val", nn.functional.mse_loss(self(batch[0]), batch[1]))

    def test_step(self, batch: Any, index: int) -> None:
        self.log("test", nn.functional.mse_loss(self(batch[0]), batch[1]))

    def predict_step(self, batch: Any, index: int) -> torch.Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=0.1)


def data(batches: int = 4, shuffle: bool = False) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batches * 4, SIZE, generator=generator)
    return DataLoader(TensorDataset(x, x.flip(1)), batch_size=4, shuffle=shuffle)


def trainer(folder: Any, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": folder,
        "num_sanity_val_steps": 0,
    }
    return pl.Trainer(callbacks=list(callbacks), **{**settings, **options})


def factors(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_parameters() if "lora_" in name]


def clean_environment() -> dict[str, str]:
    """Without the seed that Lightning's command line leaves behind, from which ranks that are started would draw."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PL_")}
