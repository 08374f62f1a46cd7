"""The model that a Hugging Face checkpoint is of, on the meta device; transformers is imported only here."""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..lang.diagnostics import Diagnostic, Error

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def model_type(folder: Path) -> str | None:
    """What `config.json` says; None where there is none, or it is no config of transformers."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return None
    said = config.get("model_type") if isinstance(config, dict) else None
    return said if isinstance(said, str) else None


def meta_model(folder: Path, why: str) -> PreTrainedModel:
    """The model of the class that `config.json` names, without a byte of its weights, and without remote code.

    `why` it is needed, for who has no transformers. Raises `Error` (GP645).
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8-sig"))
    cls = _class_of(config, why)
    skipped = ("attn_implementation", "_attn_implementation", "quantization_config")
    plain = {key: value for key, value in config.items() if key not in skipped}
    try:
        with _quiet(), torch.device("meta"):
            return cls._from_config(cls.config_class.from_dict(plain))  # type: ignore[no-any-return]
    except Exception as error:  # whatever a model's constructor makes of a config
        raise _cannot(f"{why}, and {cls.__name__} cannot be built from {folder / 'config.json'}", error) from None


def never_saved(folder: Path, names: Iterable[str]) -> set[str]:
    """Those of the weights that the model of `config.json` leaves out of its checkpoints, as it makes them anew."""
    if model_type(folder) is None:
        return set()
    try:
        cls = _class_of(json.loads((folder / "config.json").read_text(encoding="utf-8-sig")), "")
    except Error:
        return set()
    patterns = getattr(cls, "_keys_to_ignore_on_save", None) or ()
    return {name for name in names if any(re.search(pattern, name) for pattern in patterns)}


def _class_of(config: Any, why: str) -> Any:
    try:
        import transformers
        from transformers import PreTrainedModel
        from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES
    except ImportError as error:
        raise _cannot(f"{why}, and transformers cannot be imported", error, "pip install transformers") from None
    named = config.get("architectures")
    name = named[0] if isinstance(named, list) and named else MODEL_MAPPING_NAMES.get(config.get("model_type"))
    cls: Any = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel) and cls.config_class is not None):
        raise _cannot(f"{why}, and transformers {transformers.__version__} has no model class {name}", None)
    return cls


def _cannot(title: str, error: Exception | None, *fixes: str) -> Error:
    text = (f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",) if error else ()
    return Error(Diagnostic("GP645", title, text=text, fixes=fixes))


@contextmanager
def _quiet() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
