"""Model families by their default configs: what the `.tree` fixtures are made from.

`python -m tests.rules.families` writes them anew, after an upgrade of transformers say; `graphpatch diff` of the old and
new file then tells what was renamed.
"""

from __future__ import annotations

from pathlib import Path

TREES = Path(__file__).parent / "trees"

FAMILIES = {
    "llama": "LlamaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "bert": "BertForMaskedLM",
    "t5": "T5ForConditionalGeneration",
    "llava": "LlavaForConditionalGeneration",
    "mamba": "MambaForCausalLM",
    "gpt_neox": "GPTNeoXForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "vit": "ViTForImageClassification",
    "clip": "CLIPModel",
    "roberta": "RobertaForMaskedLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "opt": "OPTForCausalLM",
    "falcon": "FalconForCausalLM",
    "bloom": "BloomForCausalLM",
    "mpt": "MptForCausalLM",
    "whisper": "WhisperForConditionalGeneration",
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "jamba": "JambaForCausalLM",
    "distilbert": "DistilBertForMaskedLM",
    "deberta": "DebertaV2ForMaskedLM",
}


def build(family: str):
    """The family's model from its default config, on the meta device."""
    import torch
    import transformers

    cls = getattr(transformers, FAMILIES[family])
    with torch.device("meta"):
        return cls(cls.config_class())


def main() -> None:
    import graphpatch

    TREES.mkdir(exist_ok=True)
    for family in FAMILIES:
        graphpatch.Tree.of(build(family)).write(str(TREES / f"{family}.tree"))


if __name__ == "__main__":
    main()
