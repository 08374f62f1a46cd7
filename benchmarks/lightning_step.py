"""What the callback costs, from `trainer.fit` to the first step and in each step, beside a model patched by hand.

    python benchmarks/lightning_step.py [--steps 60] [--repeats 5]

A small Llama of `transformers` under Lightning, LoRA of rank 8 on all linears. The two take turns; each figure is the
least over the turns.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from time import perf_counter
from typing import Any

import lightning.pytorch as pl
import torch
from table import row
from transformers import LlamaConfig, LlamaForCausalLM

import graphpatch
from graphpatch.lightning import ModelTransform

RULES = graphpatch.parse("patch layers[*].**:Linear with lora(rank=8)\nfreeze ** except @new")


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            vocab_size=1000,
        )
        self.model = LlamaForCausalLM(config)

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad])


class Clock(pl.Callback):
    """When the first batch began, and how long each step took."""

    def __init__(self) -> None:
        self.first, self._at = 0.0, 0.0
        self.steps: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self._at = perf_counter()
        self.first = self.first or self._at

    def on_train_batch_end(self, *_: Any) -> None:
        self.steps.append(perf_counter() - self._at)


def run(with_callback: bool, steps: int) -> tuple[float, float]:
    """Seconds to the first step, from the start of fit or of patching by hand, and the median of a step."""
    module, clock = Module(), Clock()
    callbacks: list[pl.Callback] = [ModelTransform(RULES), clock] if with_callback else [clock]
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data: Any = torch.utils.data.DataLoader(torch.randint(1000, (steps, 64)), batch_size=1)  # type: ignore[arg-type]
    started = perf_counter()
    if not with_callback:
        graphpatch.apply(module.model, RULES)
    trainer.fit(module, data)
    return clock.first - started, sorted(clock.steps)[len(clock.steps) // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    turns: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    run(True, 3)
    for _ in range(options.repeats):
        for kind in (True, False):
            turns[kind].append(run(kind, options.steps))
    (ours_first, ours), (hand_first, hand) = (tuple(map(min, zip(*turns[kind]))) for kind in (True, False))
    row("to the first step, the callback", ours_first * 1e3, "ms")
    row("to the first step, patched by hand", hand_first * 1e3, "ms")
    row("a step, the callback", ours * 1e3, "ms")
    row("a step, patched by hand", hand * 1e3, "ms")
    row("  callback / by hand", ours / hand, "x", "at most 1.02")


if __name__ == "__main__":
    main()
