"""What each reader refuses, and what it loads and computes wrongly: a row a constraint, with its source.

Sources are the versions that were read: vllm 0.33.0, sglang 0.5.23, diffusers 0.42.1, mlx-lm 0.32.2, peft 0.21.2 (as
published), TensorRT-LLM @007e181b, llama.cpp @0b03adaa, TGI @db931fcf, Ollama @02420803.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from . import of_config as config
from . import of_experts as experts
from . import of_model as model
from . import of_tensors as tensors
from .case import Predicate

Effect = Literal["refused", "misread"]
"""The reader says no; or it says nothing, and computes something else."""


class Row(NamedTuple):
    reader: str
    name: str
    effect: Effect
    check: Predicate
    """Gives the witnesses against it."""
    says: str
    fix: str
    source: str


_PORTABLE = "write it as every reader understands it: profile portable"
_EXPORT = "graphpatch export DIR OUT --for {}"
_TRT_KEY = (
    r"(.*)\.(\d+)\.(\w+)\.(\w+|\w+\.\w+|(\w+)\.(\d+)\.(\w+))"
    r"\.(?:lora_(?:[AB]\.weight|magnitude_vector)|weight_m_wdecomp.weight)"
)
_SGLANG_NAMES = (
    "q_proj k_proj v_proj qkv_proj o_proj out_proj gate_proj up_proj gate_up_proj down_proj embed_tokens vocab_emb "
    "embeddings word_embeddings lm_head output unembed_tokens q_a_proj kv_a_proj_with_mqa fused_qkv_a_proj_with_mqa "
    "q_b_proj kv_b_proj in_proj in_proj_qkvz fc1_latent_proj fc2_latent_proj wq_b wk weights_proj qkvr wo_ud"
).split()
_TRT_NAMES = "q_proj k_proj v_proj o_proj gate_proj down_proj up_proj gate_up_proj w1 w2 w3 gate".split()
_OTHER = r"\.(embed_tokens|lm_head)\.base_layer\.weight$|(classifier|score)\.|lora_magnitude|\.bias$|trainable_tokens"
STACKED = ("gpt_oss", "qwen3_5", "qwen3_vl_moe", "qwen3_omni", "interns1")
"""Model types whose experts vLLM keeps in stacks (`is_3d_moe_weight`)."""
_HELPER, _MODEL = "vllm lora/peft_helper.py", "vllm lora/lora_model.py"
_LORA, _POOL = "sglang lora/lora.py", "sglang lora/mem_pool.py"
_TRT = "TensorRT-LLM lora_manager.py"
_LLAMA, _HF = "llama.cpp convert_lora_to_gguf.py", "llama.cpp convert_hf_to_gguf.py"
_MLX = "mlx_lm tuner/utils.py"
_PEFT = "peft utils/save_and_load.py"
_DIFFUSERS = "diffusers loaders/peft.py"

TABLE: tuple[Row, ...] = (
    # ── PEFT itself, and Transformers through it ──
    Row("peft", "layout", "refused", config.is_no("peft"),
        "PEFT reads adapter_config.json and adapter_model.safetensors", "save it with PEFT, or with to_peft", _PEFT),
    Row("peft", "prefix", "misread", tensors.keys_without_prefix,
        "keys without `base_model.model.` are unexpected, and are left out without a word",
        "put base_model.model. in front of every key", _PEFT),
    Row("peft", "path", "misread", model.no_such_module,
        "keys of no module are unexpected, and are left out without a word",
        "it was made for another model, or on a wrapped one", _PEFT),
    Row("peft", "shape", "refused", model.misfit, "a tensor of another shape fails to load",
        "it was made for a model of another size", _PEFT),
    Row("peft", "factors", "misread", tensors.lone_factors, "the missing factor stays as it is initialised",
        "save the adapter again", _PEFT),
    Row("peft", "settings", "refused", config.lacks("r", "target_modules"), "these have no usable default",
        "save the adapter again", "peft tuners/lora/config.py"),
    Row("peft", "targets", "misread", model.outside_the_targets,
        "PEFT makes the modules that target_modules names, and leaves out the keys of others without a word",
        "name them in target_modules", "peft tuners/tuners_utils.py check_target_module_exists"),
    Row("peft", "rank", "refused", tensors.rank_is_not_as_configured,
        "modules are made with the rank that the config says, and other tensors do not fit",
        "write r and rank_pattern as the tensors are", "peft tuners/lora/model.py"),
    Row("peft", "dense layers", "misread", experts.taken_for_experts,
        "of a model with stacked experts PEFT takes a dense layer's gate_proj for that of an expert, and loses it",
        "profile peft names such a module by its parameter", "peft utils/transformers_weight_conversion.py; peft#3711"),
    Row("peft", "folder", "misread", config.beside_a_model,
        "beside a model's config an adapter is put into the model by from_pretrained, asked for or not",
        "give it a folder of its own", "transformers modeling_utils.py from_pretrained"),
    Row("unsloth", "layout", "refused", config.is_no("peft"), "Unsloth reads PEFT's directories",
        _EXPORT.format("peft"), "unsloth models/loader.py"),
    Row("unsloth", "folder", "refused", config.beside_a_model, "an adapter beside a model is refused",
        "give it a folder of its own", "unsloth models/loader.py"),
    Row("unsloth", "base", "refused", config.lacks("base_model_name_or_path"), "the base is found by its name",
        "write base_model_name_or_path: export --base NAME", "unsloth models/loader.py"),
    # ── vLLM ──
    Row("vllm", "layout", "refused", config.is_no("peft"), "vLLM reads PEFT's directories", _EXPORT.format("vllm"),
        _MODEL),
    Row("vllm", "settings", "refused", config.lacks("r", "lora_alpha", "target_modules"), "these are required",
        "write them into adapter_config.json", _HELPER),
    Row("vllm", "dora", "refused", tensors.has_dora, "DoRA is not supported",
        "merge it into the base: graphpatch merge", _HELPER),
    Row("vllm", "bias", "refused", tensors.has_bias, "biases are not supported", "merge it into the base", _HELPER),
    Row("vllm", "variants", "refused",
        config.switched_on("alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora"),
        "these kinds of LoRA are not supported", "merge it into the base", _HELPER),
    Row("vllm", "init", "refused", config.init_outside("gaussian", "eva", "orthogonal", "mica", "lora_ga"),
        "an init that changed the base weights would be misread",
        "where the factors were converted to plain LoRA, say init_lora_weights: true", _HELPER),
    Row("vllm", "modules_to_save", "refused", config.saves_modules_outside("classifier", "score"),
        "whole modules other than a classifier are not supported", "merge it into the base", _HELPER),
    Row("vllm", "tokens", "refused", tensors.has_token_deltas, "trained token rows are not supported",
        "merge it into the base", _HELPER),
    Row("vllm", "key", "refused",
        tensors.other_keys(_OTHER),
        "a tensor that is neither A nor B is an error", _PORTABLE, "vllm lora/utils.py parse_fine_tuned_lora_name"),
    Row("vllm", "rank", "refused", tensors.rank_above(16),
        "ranks above --max-lora-rank are refused, and its default is 16",
        "start it with --max-lora-rank 32 (64, 128, 256, 320, 512), and validate with --max-rank",
        "vllm config/lora.py"),
    Row("vllm", "factors", "refused", tensors.lone_factors, "every module needs both factors",
        "save the adapter again", _MODEL),
    Row("vllm", "name", "refused", model.unknown_leaf, "the last name must be one of the model's linears",
        "it was made for another model", f"{_MODEL} check_unexpected_modules"),
    Row("vllm", "path", "misread", model.known_leaf_elsewhere,
        "only the last name is checked: under another path it loads, and does nothing",
        "keys must have the paths of the served model; it may have been trained on a wrapped one",
        f"{_MODEL} check_unexpected_modules; vllm#34186, #48019, #34591"),
    Row("vllm", "shape", "refused", model.misfit, "factors of another shape do not fit its buffers",
        "it was made for a model of another size", "vllm lora/layers"),
    Row("vllm", "experts", "refused", experts.fused_outside(*STACKED),
        "this model's experts are served one by one, `experts.{i}.gate_proj`, and stacks raise",
        "profile portable; or start it with --enable-mixed-moe-lora-format", "vllm lora/model_manager.py; vllm#47088"),
    Row("vllm", "expert names", "refused", experts.not_as_in_the_files,
        "experts have the names of the model's files", _PORTABLE, "vllm lora/utils.py process_packed_modules_mapping"),
    Row("vllm", "stacks", "refused", experts.single_of(*STACKED), "this model's experts are served as stacks",
        "profile peft", "vllm lora/model_manager.py, is_3d_moe_weight"),
    Row("vllm", "pair", "refused", experts.half_a_pair_of(*STACKED),
        "a stack needs both pairs: `experts.base_layer` is gate_up, `experts` is down",
        "train both, or add a pair of zeros", "vllm lora/model_manager.py"),
    # ── SGLang ──
    Row("sglang", "layout", "refused", config.is_no("peft"), "SGLang reads PEFT's directories",
        _EXPORT.format("sglang"), _LORA),
    Row("sglang", "kind", "refused", config.no_lora, "only peft_type LORA is read", "convert it to LoRA", _LORA),
    Row("sglang", "settings", "refused", config.lacks("r", "lora_alpha", "target_modules"), "these are required",
        "write them into adapter_config.json", "sglang lora/lora_config.py"),
    Row("sglang", "targets", "refused", config.target_is_a_regex, "target_modules must be a list, or all-linear",
        "write the list of the last names", "sglang lora/utils.py get_normalized_target_modules"),
    Row("sglang", "dora", "refused", tensors.has_dora, "DoRA is not supported", "merge it into the base",
        "sglang lora/lora_manager.py validate_new_adapter"),
    Row("sglang", "vocabulary", "refused", model.adds_tokens, "adapters that add tokens are not supported",
        "merge it into the base", "sglang lora/lora_manager.py validate_new_adapter"),
    Row("sglang", "scale", "misread", tensors.scale_is_not("r"),
        "use_rslora, rank_pattern and alpha_pattern are ignored: every module is taken times lora_alpha / r",
        _PORTABLE, f"{_LORA} LoRAAdapter.scaling; sglang#40835"),
    Row("sglang", "one rank", "refused", tensors.rank_is_not_r, "all modules must have the rank r", _PORTABLE,
        f"{_POOL} load_lora_weight_tensor"),
    Row("sglang", "rank", "refused", tensors.rank_above(None), "ranks above --max-lora-rank are refused",
        "start it with a higher --max-lora-rank", f"{_POOL} can_support"),
    Row("sglang", "experts", "refused", experts.fused, "PEFT's stacks of experts match none of its targets",
        _PORTABLE, f"{_POOL}; sglang#25528"),
    Row("sglang", "v beside q", "refused", tensors.without("v_proj", "q_proj"),
        "q, k and v are one: a q_proj without v_proj is a KeyError",
        "target v_proj too; profile portable adds factors of zeros", f"{_LORA} normalize_qkv_proj"),
    Row("sglang", "q beside k", "refused", tensors.without("q_proj", "k_proj"),
        "q, k and v are one: k_proj and v_proj alone match no target", "profile portable adds factors of zeros",
        f"{_LORA} normalize_qkv_proj"),
    Row("sglang", "q beside v", "refused", tensors.without("q_proj", "v_proj"),
        "q, k and v are one: k_proj and v_proj alone match no target", "profile portable adds factors of zeros",
        f"{_LORA} normalize_qkv_proj"),
    Row("sglang", "gate beside up", "refused", tensors.without("gate_proj", "up_proj", True),
        "gate and up are one: an up_proj alone matches no target", "profile portable adds factors of zeros",
        f"{_LORA} normalize_gate_up_proj"),
    Row("sglang", "q_a beside kv_a", "refused", tensors.without("q_a_proj", "kv_a_proj_with_mqa"),
        "q_a and kv_a are one: a kv_a_proj_with_mqa alone matches no target", "profile portable adds factors of zeros",
        f"{_LORA} normalize_fused_qkv_a_proj"),
    Row("sglang", "kv_a beside q_a", "refused", tensors.without("kv_a_proj_with_mqa", "q_a_proj"),
        "q_a and kv_a are one: zeros of q_a's shape take the place of kv_a, and do not fit",
        "profile portable adds factors of zeros", f"{_LORA} normalize_fused_qkv_a_proj"),
    Row("sglang", "target names", "refused", config.targets_outside(*_SGLANG_NAMES),
        "a name in target_modules whose sizes it does not know stops the server; experts' w1 to w3 are gate_proj, "
        "up_proj and down_proj there", _EXPORT.format("sglang"), "sglang lora/utils.py get_default_hidden_dim"),
    Row("sglang", "embeddings", "misread", tensors.embeddings_outside_the_targets,
        "embeddings and head are dropped unless target_modules names them", "name them in target_modules",
        f"{_LORA} _process_weight"),
    Row("sglang", "layers", "misread", tensors.outside_numbered_layers, "weights outside `layers.N.` are dropped",
        "SGLang cannot serve this part; merge it into the base", "sglang layers/utils get_layer_id"),
    Row("sglang", "key", "misread",
        tensors.other_keys(r"\.(embed_tokens|lm_head)\.base_layer\.weight$|lora_magnitude"),
        "tensors that are neither A nor B are dropped, or taken for a B", _PORTABLE, _POOL),
    Row("sglang", "path", "misread", model.no_such_module,
        "only the layer's number and a part of the name are looked at", "keys must have the paths of the served model",
        "sglang lora/utils.py get_target_module_name"),
    Row("sglang", "shape", "refused", model.misfit, "factors of another shape do not fit its buffers",
        "it was made for a model of another size", f"{_POOL} load_lora_weight_tensor"),
    Row("sglang", "factors", "refused", tensors.lone_factors, "every module needs both factors",
        "save the adapter again", _POOL),
    # ── TensorRT-LLM ──
    Row("trtllm", "layout", "refused", config.is_no("peft"), "TensorRT-LLM reads PEFT's directories",
        _EXPORT.format("trtllm"), _TRT),
    Row("trtllm", "settings", "refused", config.lacks("r", "lora_alpha"), "these are required",
        "write them into adapter_config.json", _TRT),
    Row("trtllm", "key", "refused", tensors.keys_unlike(_TRT_KEY, ("lm_head", "embed_tokens")),
        "every key must be `...N.block.module.lora_A.weight`", "TensorRT-LLM cannot serve this part; merge it",
        f"{_TRT} HF_LORA_PATTERN"),
    Row("trtllm", "embeddings", "misread", tensors.keys_with("lm_head", "embed_tokens"),
        "LoRA on embeddings and head is skipped", "leave them out, or merge the adapter", f"{_TRT} iterate_hf_lora"),
    Row("trtllm", "modules", "refused",
        tensors.names_outside(*_TRT_NAMES, "lm_head", "embed_tokens"),
        "only these modules are known: q, k, v, o, gate, up, down, gate_up_proj, w1 to w3 and gate",
        "merge it, or give the engine a map of its own", f"{_TRT} get_default_trtllm_modules_to_hf_modules"),
    Row("trtllm", "scale", "misread", tensors.scale_is_not("rank or root"), "alpha_pattern is ignored", _PORTABLE,
        f"{_TRT} load_from_model_dir; TensorRT-LLM#1669"),
    Row("trtllm", "expert names", "misread",
        experts.named_as_dense,
        "experts are w1, w2 and w3; a gate_proj is taken for that of a dense layer",
        "rename the experts' modules to w1, w3 and w2", f"{_TRT} get_default_trtllm_modules_to_hf_modules"),
    Row("trtllm", "dora experts", "refused", tensors.has_dora_on_experts, "DoRA on experts is not supported",
        "merge it into the base", _TRT),
    Row("trtllm", "stacks of layers", "misread", tensors.one_layer_twice,
        "a layer is told by its number and the last names: those of two stacks are one", "adapt one stack alone",
        f"{_TRT} iterate_hf_lora"),
    Row("trtllm", "path", "misread", model.no_such_module, "what stands before a layer's number is not looked at",
        "keys must have the paths of the served model", f"{_TRT} iterate_hf_lora"),
    Row("trtllm", "shape", "refused", model.misfit, "factors of another shape do not fit",
        "it was made for another model", _TRT),
    Row("trtllm", "factors", "refused", tensors.lone_factors, "every module needs both factors",
        "save the adapter again", _TRT),
    # ── llama.cpp, and Ollama with it ──
    Row("llamacpp", "layout", "refused", config.is_no("peft"), "the converter reads PEFT's directories",
        _EXPORT.format("llamacpp"), _LLAMA),
    Row("llamacpp", "settings", "refused", config.lacks("lora_alpha"), "lora_alpha is required",
        "write it into adapter_config.json", _LLAMA),
    Row("llamacpp", "scale", "misread", tensors.scale_is_not("rank"),
        "use_rslora and alpha_pattern are ignored: every module is taken times lora_alpha / rank", _PORTABLE, _LLAMA),
    Row("llamacpp", "key", "refused", tensors.other_keys(r"_layernorm|\.norm|\.base_layer\.weight"),
        "a tensor that is neither A nor B nor a norm stops the converter", _PORTABLE,
        f"{_LLAMA} get_tensors; llama.cpp#9948"),
    Row("llamacpp", "factors", "refused", tensors.lone_factors, "every module needs both factors",
        "save the adapter again", _LLAMA),
    Row("llamacpp", "experts", "refused", experts.fused, "stacks of experts have no name that it could map",
        _PORTABLE, _LLAMA),
    Row("llamacpp", "expert names", "refused", experts.not_as_in_the_files,
        "experts have the names of the model's files", _PORTABLE, f"{_HF} modify_tensors"),
    Row("llamacpp", "all experts", "refused", experts.some_missing,
        "experts are stacked, so all of a layer must be there", "profile portable adds factors of zeros",
        f"{_HF} modify_tensors"),
    Row("llamacpp", "head", "refused", model.head_is_tied, "the base has no lm_head of its own, since it is tied",
        "leave the head out, or merge the adapter", f"{_LLAMA}; llama.cpp#9065"),
    Row("llamacpp", "path", "refused", model.no_such_module, "a path that is none of the model's cannot be mapped",
        "keys must have the paths of the model", f"{_HF} map_tensor_name"),
    Row("llamacpp", "shape", "refused", model.misfit, "factors of another shape do not fit",
        "it was made for another model", _LLAMA),
    Row("ollama", "layout", "refused", config.is_no("peft"), "Ollama reads PEFT's directories, or a GGUF",
        _EXPORT.format("llamacpp"), "ollama convert/convert_adapter.go"),
    Row("ollama", "model", "refused",
        model.kind_outside("llama", "gemma2"),
        "only adapters of llama and gemma2 are converted", "convert it with llama.cpp, and give Ollama the GGUF",
        "ollama convert/convert.go ConvertAdapter"),
    Row("ollama", "scale", "misread", tensors.scale_is_not("rank"), "use_rslora and alpha_pattern are ignored",
        _PORTABLE, "ollama convert/convert_adapter.go"),
    Row("ollama", "orientation", "misread", tensors.rank_above_sizes,
        "which side of a factor is the rank is guessed: the shorter", "take a rank below the sizes of the module",
        "ollama convert/convert_llama_adapter.go"),
    # ── TGI ──
    Row("tgi", "layout", "refused", config.is_no("peft"), "TGI reads PEFT's directories", _EXPORT.format("vllm"),
        "TGI utils/peft.py"),
    Row("tgi", "prefix", "misread", tensors.keys_without_prefix, "keys without `base_model.model.` are not found",
        "put base_model.model. in front of every key", "TGI adapters/lora.py"),
    Row("tgi", "path", "misread", model.no_such_module, "weights that it does not use are a warning",
        "keys must have the paths of the served model", "TGI adapters/weights.py"),
    # ── mlx-lm ──
    Row("mlx", "layout", "refused", config.is_no("mlx"),
        "mlx-lm reads adapters.safetensors, with transposed factors and a config of its own", _EXPORT.format("mlx"),
        _MLX),
    Row("mlx", "settings", "refused", config.mlx_settings,
        "num_layers, and one rank, scale and dropout for all, are required", _EXPORT.format("mlx"),
        f"{_MLX} linear_to_lora_layers"),
    Row("mlx", "keys", "refused", config.mlx_keys, "a tensor of a module that `keys` does not name is refused",
        "name it in lora_parameters.keys", f"{_MLX} load_adapters"),
    Row("mlx", "names", "refused",
        tensors.keys_unlike(r"model\.(layers\.\d+|embed_tokens)\.|lm_head\."),
        "modules have mlx-lm's own names, which are not known here beyond model.layers, embed_tokens and lm_head",
        "rename the keys as the model's `sanitize` does", "mlx_lm models, sanitize"),
    Row("mlx", "parts", "refused", model.taken_apart("kv_b_proj", "deepseek_v3", "deepseek_v32"),
        "kv_b_proj is taken apart, into embed_q and unembed_out", "leave it out, or merge the adapter",
        "mlx_lm models/deepseek_v3.py sanitize"),
    Row("mlx", "factors", "misread", tensors.lone_factors, "a missing factor stays as it is initialised",
        "export it again", f"{_MLX} load_adapters"),
    Row("mlx", "key", "refused",
        tensors.other_keys(r"\.m$"),
        "a tensor that is no factor is refused", "leave it out", f"{_MLX} load_adapters"),
    Row("mlx", "path", "refused", model.no_such_module,
        "a tensor of no module of the model is refused", "it was made for another model", f"{_MLX} load_adapters"),
    Row("mlx", "shape", "refused", model.misfit,
        "a tensor of another shape is refused", "it was made for another model", f"{_MLX} load_adapters"),
    # ── diffusers ──
    Row("diffusers", "layout", "refused", config.is_no("diffusers"),
        "pipelines read pytorch_lora_weights.safetensors, with keys that begin with a part of the pipeline",
        _EXPORT.format("diffusers"), "diffusers loaders/lora_base.py"),
    Row("diffusers", "alpha", "misread",
        config.lacks("lora_alpha"),
        "without metadata in the header alpha is taken to be the rank", _EXPORT.format("diffusers"),
        "diffusers utils/peft_utils.py get_peft_kwargs"),
    Row("diffusers", "dora", "misread", tensors.keys_with("dora_scale"), "dora_scale is dropped with a warning",
        "merge it into the base", "diffusers loaders/lora_pipeline.py"),
    Row("diffusers", "key", "refused", tensors.keys_unlike(r".*lora", ("dora_scale",)),
        "every key must have `lora` in it", "leave the others out",
        "diffusers loaders/lora_pipeline.py load_lora_weights"),
    Row("diffusers", "part", "misread",
        model.without_part,
        "load_lora_weights of a pipeline takes the keys that begin with its parts, and passes by the others",
        "model.load_lora_adapter(FILE, prefix=None) loads it; save_lora_weights of the pipeline names the part",
        f"{_DIFFUSERS} load_lora_adapter"),
    Row("diffusers", "path", "misread",
        model.no_such_module,
        "keys of no module are a warning", "it was made for another model",
        f"{_DIFFUSERS} _maybe_warn_for_unhandled_keys"),
)  # fmt: skip

READERS: tuple[str, ...] = tuple(dict.fromkeys(row.reader for row in TABLE))
