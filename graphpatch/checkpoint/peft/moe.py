"""Models of experts whose targets PEFT renames when it loads an adapter, though it was made for them as they are.

From Transformers 5 on their experts are stacked. PEFT takes any target whose name ends like an expert's linear did for
one of an older adapter, and gives the stack an adapter in its place: a dense layer's `mlp.gate_proj` as well
(huggingface/peft#3711). Such a linear is named by its parameter instead, `mlp.gate_proj.weight`, which PEFT leaves be,
computes alike and saves under the same keys.

Source: peft 0.21.2, utils/transformers_weight_conversion.py, `_MOE_TARGET_MODULE_MAPPING`; transformers 5.24,
conversion_mapping.py, `_MODEL_TO_CONVERSION_PATTERN` (both Apache-2.0).
"""

from __future__ import annotations

_MIXTRAL = frozenset({"gate", "w1", "w2", "w3"})
_QWEN2_MOE = frozenset({"gate", "gate_proj", "up_proj", "down_proj"})

RENAMED: dict[str, frozenset[str]] = {
    **dict.fromkeys(("mixtral", "minimax", "minimax_m2"), _MIXTRAL),
    **dict.fromkeys(
        (
            "Dots3NoteTextModel", "afmoe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe",
            "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "glm4v_moe", "longcat_flash", "solar_open", "mellum",
            "qwen3_moe", "beam", "qwen3_omni_moe", "qwen3_omni_moe_thinker", "qwen3_omni_moe_text", "qwen3_next",
            "hunyuan_v1_moe", "flex_olmo", "olmoe", "sarvam_mla", "exaone_moe", "cohere2_moe",
            "UnlimitedOcrTextModel",
        ),
        _QWEN2_MOE,
    ),
}  # fmt: skip
"""By model type, the last names that are taken for an expert's."""


def is_renamed(model_type: object, path: str) -> bool:
    """Whether PEFT would take a target for an expert of an older adapter."""
    names = RENAMED.get(model_type) if isinstance(model_type, str) else None
    return names is not None and path.rpartition(".")[2] in names
