"""`graphpatch plan` on a model of the size of Llama 405B, given its config.json alone, end to end: wall seconds.

The measure is what the command cannot avoid: import torch and Transformers, build the model on the meta device.

    python benchmarks/plan_cli.py
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from cold_start import python, wall
from table import row

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "torch_dtype": "bfloat16",
}
BUILD = """
import torch
from transformers import AutoConfig, AutoModelForCausalLM
with torch.device("meta"):
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained({folder!r}))
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(CONFIG))
        needed = python(BUILD.format(folder=folder), repeats=5)
        whole = wall("-m", "graphpatch.cli", "plan", "lora", "--model", folder, repeats=5)
    row("import torch, transformers; build the model", needed)
    row("graphpatch plan lora --model config.json", whole)
    row("  plan / import and build", whole / needed, "x", "at most 1.2")


if __name__ == "__main__":
    main()
