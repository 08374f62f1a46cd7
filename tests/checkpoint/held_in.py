"""The check without a GPU: what vLLM, SGLang, TensorRT-LLM and llama.cpp ask of an adapter, written down anew here.

It knows nothing of the package: the model's own files say which modules there are, and what an update makes of them.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

_SUFFIXES = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")
_TRT = re.compile(
    r"(.*)\.(\d+)\.(\w+)\.(\w+|\w+\.\w+|(\w+)\.(\d+)\.(\w+))\.(?:lora_(?:(A|B)\.weight|(magnitude)_vector)|weight_(m_wdecomp).weight)"
)


def files_of(model: nn.Module, folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, by the names they have in its files: experts one by one."""
    model.save_pretrained(folder)
    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}


def held_in(
    folder: Path, before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], transposed: bool = False
) -> None:
    """`before` and `after` are the base's files and those of the base with the trained updates merged into it."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    # (1) required fields, and nothing that vLLM refuses
    assert config["r"] > 0 and config["lora_alpha"] > 0 and isinstance(config["target_modules"], list)
    assert not config["use_dora"] and config["bias"] == "none" and not config["modules_to_save"]
    assert config["init_lora_weights"] is True and config["peft_type"] == "LORA"
    # (2) the default of --max-lora-rank
    ranks = {tensor.shape[0] for key, tensor in tensors.items() if "_A" in key}
    assert max(ranks) <= 16 and ranks == {config["r"]}
    # (3) prefix and suffix
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        suffix = next(s for s in _SUFFIXES if key.endswith(s))
        assert key.startswith("base_model.model.")
        pairs.setdefault(key.removeprefix("base_model.model.").removesuffix(suffix), {})[suffix] = tensor
    # (4) the last name, or the tail of an expert, is one of the model's
    tails = {_tail(key.removesuffix(".weight")) for key in before if key.endswith(".weight")}
    assert {_tail(path) for path in pairs} <= tails
    # (5) the whole path is; both factors are there; their shapes fit
    deltas = {}
    for path, factors in pairs.items():
        (first, a), (second, b) = sorted(factors.items())
        assert "_A" in first and "_B" in second
        weight, delta = before[f"{path}.weight"], b.double() @ a.double()
        delta = delta.t() if transposed or "embedding" in first else delta
        assert delta.shape == weight.shape, path
        deltas[f"{path}.weight"] = delta
    # (6) the delta is what was trained, by vLLM's scale and by SGLang's, and nothing that was trained is missing
    ours = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    theirs = config["lora_alpha"] / config["r"]
    for key, weight in before.items():
        trained = after[key].double() - weight.double()
        if key not in deltas:
            assert not trained.any(), key
        for scale in (ours, theirs) if key in deltas else ():
            torch.testing.assert_close(deltas[key] * scale, trained, rtol=1e-5, atol=2e-6)
    assert any(delta.any() for delta in deltas.values())
    # (7) TensorRT-LLM can take every key apart
    assert all(_TRT.match(key) or "embed_tokens" in key or "lm_head" in key for key in tensors)
    # (8) nothing but factors, as llama.cpp has it: that is (3)
    assert config["rank_pattern"] == {} == config["alpha_pattern"] and not config["use_rslora"]


def _tail(path: str) -> str:
    return path[path.index(".experts.") :] if ".experts." in path else path.rpartition(".")[2]
