"""A Hugging Face config, built on the meta device: the model without a byte of its weights, and without remote code."""

from __future__ import annotations

import gc
import json
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..lang.diagnostics import did_you_mean
from ..tree.tree import Tree
from .problem import CannotRun, first_line
from .terminal import note, progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CALLABLE = "write a function that builds the model, and name it: --model package.module:callable"


class NoTransformersModel(CannotRun):
    """The config may be a good one, but not of a model in Transformers."""


def build(path: Path) -> Tree:
    """The tree of the model that the config at `path` describes.

    Raises `NoTransformersModel` (GP704) where its class is not in Transformers, `CannotRun` (GP703, GP705, GP709)
    where the file is broken, the model cannot be built, or Transformers is not installed.
    """
    config = _read(path)
    with quiet(), _collector_off():
        with progress("importing torch and transformers"):
            cls = _model_class(config, path)
        with progress(f"building {cls.__name__} on the meta device"):
            model = _on_meta(cls, config, path)
            return Tree.of(model)


def _read(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise CannotRun("GP703", f"{path} cannot be read as a config", text=(first_line(error),)) from None
    if not isinstance(config, dict):
        raise CannotRun("GP703", f"{path} is JSON, but no config: a config is a table of settings")
    return config


def _model_class(config: dict[str, Any], path: Path) -> type[PreTrainedModel]:
    """The class that `architectures` names; without it, the one that `AutoModel` takes for the `model_type`."""
    named = config.get("architectures")
    name = named[0] if isinstance(named, list) and named else named
    model_type = config.get("model_type")
    if not isinstance(name, str) and not isinstance(model_type, str):
        raise _no_model(config, path)
    try:
        import torch  # noqa: F401
        import transformers
        from transformers import PreTrainedModel
    except ImportError as error:
        raise CannotRun(
            "GP709",
            "a Hugging Face config is built with torch and transformers, and they cannot be imported",
            "pip install 'graphpatch[transformers]'",
            "or plan from a .tree file, which `graphpatch tree` writes where they are installed",
            text=(first_line(error),),
        ) from None
    if not isinstance(name, str):
        name = _auto_class(model_type, path)
        note(f"{path.name} names no architecture; {name} is the plain model of its model_type `{model_type}`")
    try:
        cls = getattr(transformers, name, None)
    except Exception as error:  # a lazy import inside Transformers may fail in any way
        raise CannotRun("GP705", f"{name} cannot be imported from transformers", text=(first_line(error),)) from None
    if isinstance(cls, type) and issubclass(cls, PreTrainedModel) and cls.config_class is not None:
        return cls
    text: tuple[str, ...] = ()
    fixes = [did_you_mean(name, (n for n in dir(transformers) if n[:3].lower() == name[:3].lower()))]
    if "auto_map" in config:
        text = (
            "its code comes with the checkpoint (`auto_map`), and graphpatch runs no code that a checkpoint brings",
        )
    raise NoTransformersModel(
        "GP704", f"transformers {transformers.__version__} has no model class {name}", *fixes, _CALLABLE, text=text
    )


def _auto_class(model_type: Any, path: Path) -> str:
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    found = MODEL_MAPPING_NAMES.get(model_type)
    if found is None:
        raise NoTransformersModel(
            "GP704",
            f"{path.name} names no architecture, and its model_type `{model_type}` is unknown to transformers",
            did_you_mean(str(model_type), MODEL_MAPPING_NAMES),
            _CALLABLE,
        )
    return found if isinstance(found, str) else found[0]


def _no_model(config: dict[str, Any], path: Path) -> CannotRun:
    if "_class_name" in config:
        title = f"{path} is a diffusers config ({config['_class_name']}), and only those of transformers are built"
    else:
        title = f"{path} says neither `architectures` nor `model_type`, so what it describes is unknown"
    return NoTransformersModel("GP704", title, _CALLABLE)


def _on_meta(cls: type[PreTrainedModel], config: dict[str, Any], path: Path) -> PreTrainedModel:
    import torch

    # Which kernel computes attention is no matter of structure, and may not be installed here.
    plain = {key: value for key, value in config.items() if key not in ("attn_implementation", "_attn_implementation")}
    if plain.pop("quantization_config", None) is not None:
        note("the checkpoint is quantised; the tree shows the classes of the model as it was before")
    try:
        with torch.device("meta"):
            return cls._from_config(cls.config_class.from_dict(plain))  # type: ignore[union-attr]
    except Exception as error:  # whatever a model's constructor makes of a config
        raise CannotRun(
            "GP705",
            f"{cls.__name__} cannot be built from {path}",
            "is the config complete, and made for this version of transformers?",
            text=(first_line(error),),
        ) from error


@contextmanager
def _collector_off() -> Iterator[None]:
    """All that is made here stays: looking for garbage in it costs a seventh of the time and finds none."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what libraries have to say about themselves from the terminal, and them from any hub."""
    if os.environ.get("GRAPHPATCH_DEBUG"):
        yield
        return
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
