"""NVIDIA's LoRA for megatron-core, the `peft` package of Megatron-Bridge, from a checkout of its source.

Its own package imports Transformer Engine and much else at once; of these, its LoRA on the linears of the local spec
uses nothing, and empty classes stand in. What is timed is their code as it is.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

TAG = "v0.4.1"
"""The newest that runs on megatron-core 0.16.1."""
HOW = f"git clone --depth 1 --branch {TAG} https://github.com/NVIDIA-NeMo/Megatron-Bridge"


def lora_class(checkout: str) -> Any:
    """`megatron.bridge.peft.lora.LoRA`."""
    source = Path(checkout) / "src" / "megatron" / "bridge"
    if not (source / "peft" / "lora.py").is_file():
        raise SystemExit(f"{checkout} is no checkout of Megatron-Bridge: {HOW}")
    import_module("megatron.core.models.gpt.gpt_layer_specs")  # before anything looks as if TE were there
    for name, folder in (("megatron.bridge", source), ("megatron.bridge.utils", source / "utils")):
        package = ModuleType(name)
        package.__path__ = [str(folder)]
        sys.modules[name] = package
    if "transformer_engine" not in sys.modules:
        te = _Empty("transformer_engine.pytorch")
        sys.modules |= {"transformer_engine": ModuleType("transformer_engine"), "transformer_engine.pytorch": te}
        sys.modules["transformer_engine"].pytorch = te  # type: ignore[attr-defined]
    for name in ("module_matcher", "utils"):
        module = import_module(f"megatron.bridge.peft.{name}")
        vars(module).update({flag: False for flag in vars(module) if flag.startswith("HAVE_TE")})
    return import_module("megatron.bridge.peft.lora").LoRA


class _Empty(ModuleType):
    """A module whose names are modules like it, or, with a capital, classes that nothing is an instance of."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {}) if name[0].isupper() else _Empty(name)
