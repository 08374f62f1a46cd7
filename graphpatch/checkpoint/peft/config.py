"""What `adapter_config.json` says, for LoRA. A field that would change what the adapter computes is held or refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import Enum
from os import PathLike, fspath
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...lang.diagnostics import Diagnostic, Error

CONFIG, TENSORS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_LARGEST = 64 * 2**20
"""Of a config, in bytes: one that names 100,000 modules has a tenth."""

_Count = Annotated[int, Field(strict=True, ge=1)]
_Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
_Names = list[str]


class LoraConfig(BaseModel):
    """The fields of PEFT's `LoraConfig` that decide which modules are changed, and how; the names are PEFT's."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    r: _Count = 8
    lora_alpha: _Number = 8
    lora_dropout: Annotated[float, Field(strict=True, ge=0, le=1)] = 0.0
    target_modules: _Names | str | None = None
    exclude_modules: _Names | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: _Names | str | None = None
    rank_pattern: dict[str, _Count] = {}
    alpha_pattern: dict[str, _Number] = {}
    target_parameters: _Names | None = None
    modules_to_save: _Names | None = None
    bias: Literal["none", "all", "lora_only"] = "none"
    lora_bias: bool = False
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str = True
    task_type: str | None = None
    ensure_weight_tying: bool = False
    base_model_name_or_path: str | None = None

    @property
    def layers(self) -> tuple[int, ...] | None:
        """The layer indices, None where all layers count. An empty list counts as none given, as PEFT has it."""
        given = self.layers_to_transform
        if isinstance(given, int):
            return (given,)
        return tuple(given) if given else None

    @property
    def patterns(self) -> tuple[str, ...]:
        """The names of the lists of layers; empty where any will do."""
        given = self.layers_pattern
        return () if not given else (given,) if isinstance(given, str) else tuple(given)


_WITHOUT_EFFECT = frozenset(
    # Notes, and what is not saved or read by PEFT itself; details of features that have a switch of their own
    # (`use_qalora`, `init_lora_weights`); and last what PEFT sets from the class of each layer, whatever stands here.
    "auto_mapping inference_mode peft_type peft_version revision runtime_config "
    "qalora_group_size loftq_config eva_config corda_config lora_ga_config megatron_core fan_in_fan_out".split()
)

_REFUSED = {
    "layer_replication": "the model would be built of repeated layers, which no rule does",
    "trainable_token_indices": "single rows of an embedding would train; train the embedding as a whole, or its LoRA",
    "alora_invocation_tokens": "the adapter would act on the tokens behind an invocation alone (aLoRA)",
    "use_qalora": "inputs would be pooled in groups (QALoRA)",
    "velora_config": "activations would be compressed in training (VeLoRA)",
    "monteclora_config": "the factors would be sampled (MonteCLoRA)",
    "kasa_config": "the base weights would be truncated (KaSA)",
    "use_bdlora": "the factors would be block-diagonal (BD-LoRA)",
    "arrow_config": "several adapters would be routed by token (Arrow)",
    "megatron_config": "factors of megatron's parallel layers are saved as their shards",
}
"""What changes the meaning and has no place here, with what it would do."""


def read_config(source: str | PathLike[str] | Mapping[str, Any]) -> LoraConfig:
    """The config of an adapter folder, or of a mapping with the same fields.

    Raises `Error`: GP621 where it cannot be read, GP622 for a field that cannot be followed.
    """
    if isinstance(source, Mapping):
        return config_of(source, "the config")
    path = Path(source) / CONFIG
    return config_of(_read_json(path), fspath(path))


def config_of(fields: Mapping[str, Any], what: str) -> LoraConfig:
    """Raises `Error` (GP621, GP622)."""
    fields = {str(name): _plain(value) for name, value in fields.items()}
    kind = fields.get("peft_type")
    if kind not in (None, "LORA") or (kind is None and "r" not in fields and "target_modules" not in fields):
        refuse(what, "peft_type", f"{kind!r} is another method" if kind else "it is missing", "only LORA is read")
    for name, value in fields.items():
        if name in _REFUSED and value:
            refuse(what, name, _REFUSED[name])
        if name not in LoraConfig.model_fields and name not in _WITHOUT_EFFECT | _REFUSED.keys() and value:
            fix = "if the adapter was made by a newer PEFT, look up what the field means before leaving it out"
            refuse(
                what, name, f"PEFT 0.21 has no such field, and {json.dumps(value, default=str)[:60]} may matter", fix
            )
    try:
        # `null` stands for the default: older versions of PEFT write it.
        return _checked(LoraConfig.model_validate({k: v for k, v in fields.items() if v is not None}), what)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        name = str(first["loc"][0]) if first["loc"] else "config"
        refuse(what, name, first["msg"][:1].lower() + first["msg"][1:])


def _plain(value: Any) -> Any:
    """As JSON has it: a config made in Python may hold sets and enums."""
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=str)
    if isinstance(value, tuple):
        return list(value)
    return value.value if isinstance(value, Enum) else value


def _checked(config: LoraConfig, what: str) -> LoraConfig:
    """What PEFT itself refuses when it makes a config."""
    by_text = isinstance(config.target_modules, str)
    for name in ("layers_to_transform", "layers_pattern"):
        if by_text and getattr(config, name) is not None:
            refuse(what, name, "it goes with a list of target_modules, and this is a text")
    if config.patterns and config.layers_to_transform is None:
        refuse(what, "layers_pattern", "it says where layers are counted, and layers_to_transform says none")
    if config.lora_bias and config.use_dora:
        refuse(what, "lora_bias", "it does not go with use_dora")
    if config.lora_dropout >= 1:
        refuse(what, "lora_dropout", "a dropout of 1 leaves nothing")
    return config


def refuse(what: str, field: str, why: str, *fixes: str) -> NoReturn:
    """Raise the `Error` (GP622) of a field that cannot be followed."""
    raise Error(Diagnostic("GP622", f"{what}: `{field}` cannot be followed", text=(why,), fixes=fixes))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            text = file.read(_LARGEST + 1)
    except OSError as error:
        raise Error(_absent(path, error)) from None
    if len(text) > _LARGEST:
        raise unreadable(path, "it is far too large")
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        raise unreadable(path, "it is not JSON, or cut off") from None
    if not isinstance(fields, dict):
        raise unreadable(path, "it is JSON, but not of a config")
    return fields


def unreadable(path: Path, why: str) -> Error:
    return Error(Diagnostic("GP621", f"{path} cannot be read", text=(why,), fixes=("copy the adapter's folder anew",)))


def _absent(path: Path, error: OSError) -> Diagnostic:
    folder, fixes = path.parent, []
    if folder.is_file():
        fixes.append("an adapter of PEFT is a folder: give that which holds the file")
    elif (folder / "adapter.json").exists():
        fixes.append("adapter.json is there: graphpatch.load_adapter reads it")
    elif folder.is_dir():
        inner = sorted(child.parent.name for child in folder.glob(f"*/{CONFIG}"))[:4]
        fixes += [f"PEFT saves named adapters in folders of their own: {folder / name}" for name in inner]
    why = f"{CONFIG}: {error.strerror or error}"
    return Diagnostic("GP621", f"there is no adapter of PEFT in {folder}", text=(why,), fixes=tuple(fixes))
