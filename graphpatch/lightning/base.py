"""The base's weights, loaded before the model is transformed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ..lang.diagnostics import refusal

Base = str | PathLike[str] | Mapping[str, torch.Tensor] | Callable[[nn.Module], Any]


def load_base(module: nn.Module, source: Base) -> None:
    """Load all of `module`'s weights from a safetensors file or directory, a torch or Lightning checkpoint, a state
    dict, or by a function that takes the module.

    Names may be those of the module, or of the one submodule that they all fit: a Hugging Face checkpoint for a
    LightningModule that holds the model. Raises `ApplyError`: GP820 for files, GP821 where names or shapes do not
    agree; nothing was loaded then.
    """
    if callable(source):
        source(module)
        return
    weights, said = (
        (source, "the state dict") if isinstance(source, Mapping) else (read_weights(source), fspath(source))
    )
    expected = dict(module.state_dict(keep_vars=True))
    prefix = _prefix(module, weights, expected)
    named = {prefix + name: tensor for name, tensor in weights.items()}
    there = {id(expected[name]) for name in named if name in expected}
    missing = [name for name, tensor in expected.items() if name not in named and id(tensor) not in there]
    # What stands beside the model in the module (another head, a metric) is no part of a checkpoint of the model.
    missing = [name for name in missing if name.startswith(prefix)]
    unexpected = [name for name in named if name not in expected]
    wrong = [n for n, t in named.items() if n in expected and tuple(expected[n].shape) != tuple(t.shape)]
    if missing or unexpected or wrong:
        raise refusal(
            "GP821",
            f"{said} is no checkpoint of this base: {len(missing)} tensors missing, {len(unexpected)} "
            f"unexpected, {len(wrong)} of another shape",
            "give the checkpoint of the model that is built",
            text=tuple(_lines(missing, unexpected, wrong, named, expected)),
        )
    if any(t.is_meta for t in expected.values()):
        _assign(module, named, expected)
    else:
        module.load_state_dict(named, strict=False)
    left = next((n for n, t in (*module.named_parameters(), *module.named_buffers()) if t.is_meta), None)
    if left is not None:
        raise refusal(
            "GP822",
            f"`{left}` is on the meta device, and {said} has no values for it",
            "build the model off the meta device, or fill it in configure_model",
        )


def _assign(module: nn.Module, named: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Onto the meta device, where nothing can be copied to: the file's tensors stand in the place of the module's, in
    its types, and what was one tensor is one again."""
    module.load_state_dict({n: t.to(expected[n].dtype) for n, t in named.items()}, strict=False, assign=True)
    loaded = {id(expected[name]): module.get_parameter(name) for name in named if _is_parameter(expected[name])}
    for name, tensor in expected.items():
        if id(tensor) in loaded:
            path, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(path), leaf, loaded[id(tensor)])


def _is_parameter(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, nn.Parameter)


def read_weights(source: str | PathLike[str]) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, by name. Raises `ApplyError` (GP820)."""
    path = Path(source)
    try:
        if path.is_dir():
            return dict(_of_directory(path))
        if path.suffix == ".safetensors":
            return load_file(path)
        held = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise refusal("GP820", f"there is no {error.filename or path}", "check the path of base_checkpoint") from None
    except (OSError, SafetensorError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise _unreadable(path, error) from None
    except Exception as error:  # torch raises pickle's own, of a class of theirs
        raise _unreadable(path, error) from None
    inner = held.get("state_dict", held) if isinstance(held, Mapping) else None
    if not isinstance(inner, Mapping) or not all(isinstance(t, torch.Tensor) for t in inner.values()):
        raise refusal("GP820", f"{path} holds no weights", "a state dict, or a Lightning checkpoint")
    return dict(inner)


def _of_directory(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    else:
        names = sorted(p.name for p in path.glob("*.safetensors"))
    if not names:
        raise refusal("GP820", f"{path} holds no .safetensors file", "a directory as save_pretrained writes it")
    for name in names:
        yield from load_file(path / name).items()


def _unreadable(path: Path, error: Exception) -> Exception:
    why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return refusal("GP820", f"{path} cannot be read as a checkpoint", "copy it anew", text=(why,))


def _prefix(module: nn.Module, weights: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """What the names lack: nothing, or the way to the submodule that they are the names of."""
    best = max(
        ("", *(f"{name}." for name, child in module.named_modules() if name and name.count(".") < 2)),
        key=lambda p: (sum(p + name in expected for name in weights), -len(p)),
    )
    return best


def _lines(
    missing: list[str], unexpected: list[str], wrong: list[str], named: Mapping[str, Any], expected: Mapping[str, Any]
) -> Iterator[str]:
    yield from (f"- {name}   missing" for name in missing[:4])
    yield from (f"+ {name}   unexpected" for name in unexpected[:4])
    yield from (f"~ {n}   {list(named[n].shape)}, and the model has {list(expected[n].shape)}" for n in wrong[:4])
