"""An adapter as a reader meets it: its config, and the names and shapes of its tensors. No weight is read.

Four layouts are told apart by their files: PEFT's directory, mlx-lm's, diffusers', and graphpatch's own. The factors of
all are put into one form, that of PEFT: A is (rank, in) and B (out, rank), under the path of their module.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ...lang.diagnostics import Diagnostic, Error
from ...lang.regex import problem
from ...tree.headers import Header, read_header
from ...tree.tree import Tensor, index_of

Layout = Literal["peft", "mlx", "diffusers", "graphpatch"]
WEIGHTS: Mapping[Layout, str] = {
    "peft": "adapter_model.safetensors",
    "mlx": "adapters.safetensors",
    "diffusers": "pytorch_lora_weights.safetensors",
    "graphpatch": "adapter.safetensors",
}
"""The file that each layout keeps its tensors in."""
CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
_LARGEST = 16 * 2**20
"""Of a config, in bytes: that of an adapter whose every module has a rank of its own has less."""
_PART = re.compile(
    r"(?P<path>.*)\.(?:lora_(?P<linear>[AB])\.(?:default\.)?weight|lora_embedding_(?P<embedding>[AB])|lora_(?P<mlx>[ab]))"
)


class Factors(NamedTuple):
    """The factors of one module; what the file does not hold is None."""

    path: str
    """Of the module in the base."""
    a: Tensor | None = None
    """(rank, in), or the shape of a convolution's."""
    b: Tensor | None = None
    embedding: bool = False
    keys: tuple[str, ...] = ()

    @property
    def rank(self) -> int | None:
        """As the tensors have it; of fused experts, times their number."""
        if self.a is not None and self.a.shape:
            return self.a.shape[0]
        return self.b.shape[1] if self.b is not None and len(self.b.shape) > 1 else None


@dataclass(frozen=True)
class Adapter:
    """What a directory holds."""

    folder: str
    layout: Layout
    config: Mapping[str, Any]
    """`adapter_config.json`; of diffusers, what the header's metadata says."""
    factors: Mapping[str, Factors] = field(default_factory=dict)
    """By the path of their module, in the order of their names."""
    others: Mapping[str, Tensor] = field(default_factory=dict)
    """Tensors that are no factor, by their key."""
    files: frozenset[str] = frozenset()
    """The names in the directory."""

    @classmethod
    def read(cls, directory: str | PathLike[str]) -> Adapter:
        """Raises `Error` (GP631) where there is no adapter, or one that nobody could read."""
        folder = Path(directory)
        files = _names(folder)
        layout = next((layout for layout, name in WEIGHTS.items() if name in files), None)
        if layout is None:
            raise _no_adapter(folder, files)
        if layout == "graphpatch":
            return cls(fspath(folder), layout, {}, files=files)
        header = _header(folder / WEIGHTS[layout])
        config = _of_metadata(header) if layout == "diffusers" else _json(folder / CONFIG)
        factors, others = _sorted_out(header.tensors, layout)
        return cls(fspath(folder), layout, config, factors, others, files)

    # ── what the config says, whatever it holds ──
    def number(self, name: str) -> float | None:
        """A finite number, else None."""
        return _finite(self.config.get(name))

    def words(self, name: str) -> list[str]:
        """A list of strings, else none."""
        value = self.config.get(name)
        return [w for w in value if isinstance(w, str)] if isinstance(value, list) else []

    @property
    def keys(self) -> list[str]:
        return [*(key for one in self.factors.values() for key in one.keys), *self.others]

    # ── ranks and scales, as PEFT understands them ──
    @cached_property
    def fused(self) -> frozenset[str]:
        """The paths whose factors are those of a stack of experts: `rank` is not theirs alone."""
        owners = {name.rpartition(".")[0] for name in self.words("target_parameters")}
        found = set()
        for path in self.factors:
            owner = bare(path)
            named = any(owner == o or owner.endswith(f".{o}") for o in owners if o)
            if named or owner != path or owner.rpartition(".")[2] == "experts":
                found.add(path)
        return frozenset(found)

    def rank(self, path: str) -> float | None:
        """Of one expert or module, by the config's patterns where the tensors do not say."""
        own = self.factors[path].rank
        return own if own is not None and path not in self.fused else self.configured_rank(path)

    def configured_rank(self, path: str) -> float | None:
        """What the config says."""
        return self._patterned("rank_pattern", path, self.number("r"))

    def scale(self, path: str) -> float | None:
        """What PEFT multiplies B A by; None where the config does not say."""
        alpha = self._patterned("alpha_pattern", path, self.number("lora_alpha"))
        rank = self.rank(path)
        if alpha is None or not rank or rank < 0:
            return None
        return alpha / (rank**0.5 if self.config.get("use_rslora") is True else rank)

    def _patterned(self, name: str, path: str, default: float | None) -> float | None:
        known: dict[str, Patterns] = self.__dict__.setdefault("_patterns", {})
        if name not in known:
            said = self.config.get(name)
            known[name] = Patterns(said if isinstance(said, dict) else {})
        return known[name].value(path, default)


class Patterns:
    """`rank_pattern` or `alpha_pattern`: the first key that matches a name, or an end of it, counts.

    Most keys are plain names, and are looked up: a config may have one for each of tens of thousands of modules.
    """

    def __init__(self, said: Mapping[Any, Any]):
        self._plain: dict[str, tuple[int, float]] = {}
        self._regexes: list[tuple[int, re.Pattern[str], float]] = []
        for at, (key, value) in enumerate(said.items()):
            number = _finite(value)
            if number is None:
                continue
            if re.fullmatch(r"(?:[\w-]|\\?\.)+", key):
                self._plain.setdefault(key.replace("\\", ""), (at, number))
            elif problem(key) is None:  # never run what could take forever
                self._regexes.append((at, re.compile(rf"(.*\.)?({key})$"), number))

    def value(self, path: str, default: float | None) -> float | None:
        parts = path.split(".") if self._plain else []
        ends = (".".join(parts[at:]) for at in range(len(parts)))
        found = [self._plain[end] for end in ends if end in self._plain]
        found += ((at, number) for at, regex, number in self._regexes if regex.match(path))
        return min(found)[1] if found else default


def bare(path: str) -> str:
    """A path less PEFT's `base_layer`s: of the parameters of one module each but the first is wrapped once more."""
    while path.endswith(".base_layer"):
        path = path.removesuffix(".base_layer")
    return path


def _finite(value: Any) -> float | None:
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e18
    return value if good else None


def _sorted_out(tensors: Mapping[str, Tensor], layout: Layout) -> tuple[dict[str, Factors], dict[str, Tensor]]:
    factors: dict[str, Factors] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in sorted(tensors.items(), key=lambda item: _natural(item[0])):
        part = _PART.fullmatch(key)
        if part is None or (part["mlx"] is None) == (layout == "mlx"):
            others[key] = tensor
            continue
        path = part["path"].removeprefix(PREFIX)
        one = factors.get(path, Factors(path))
        if layout == "mlx" and len(tensor.shape) == 2:
            tensor = tensor._replace(shape=tensor.shape[::-1])
        first = (part["linear"] or part["embedding"] or part["mlx"]) in "Aa"
        one = one._replace(a=tensor) if first else one._replace(b=tensor)
        factors[path] = one._replace(embedding=part["embedding"] is not None, keys=(*one.keys, key))
    return factors, others


def _natural(key: str) -> list[tuple[int, str]]:
    """`layers.2` before `layers.10`."""
    return [(index_of(segment), segment) for segment in key.split(".")]


# ── files ──


def _names(folder: Path) -> frozenset[str]:
    try:
        return frozenset(entry.name for entry in folder.iterdir())
    except OSError as error:
        fix = "an adapter is a folder: give that which holds the file" if folder.is_file() else ""
        raise _unreadable(f"there is no adapter in {folder}", error.strerror or str(error), fix) from None


def _no_adapter(folder: Path, files: frozenset[str]) -> Error:
    pickles = sorted(f for f in files if f in ("adapter_model.bin", "adapter_model.pt", "pytorch_lora_weights.bin"))
    if pickles:
        return _unreadable(
            f"the weights in {folder} are a pickle",
            f"{pickles[0]} could run any code when it is opened, and so is not",
            "load it where you trust it, and save it as safetensors",
        )
    why = f"it holds none of {', '.join(WEIGHTS.values())}"
    fixes = [f"{CONFIG} alone is there: the weights were not copied"] if CONFIG in files else []
    inner = sorted(name for name in files if any((folder / name / file).exists() for file in WEIGHTS.values()))
    fixes += [f"there is one in {folder / name}" for name in inner[:3]]  # where PEFT puts those that have a name
    return _unreadable(f"there is no adapter in {folder}", why, *fixes)


def _header(path: Path) -> Header:
    try:
        header = read_header(fspath(path))
    except Error as error:
        raise _unreadable(f"{path} cannot be read", error.diagnostics[0].title, "copy the folder anew") from None
    if header.missing:
        raise _unreadable(
            f"{path} is cut off", f"{header.missing} bytes are missing at its end", "copy the folder anew"
        )
    return header


def _json(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            text = file.read(_LARGEST + 1)
    except OSError as error:
        raise _unreadable(f"{path} cannot be read", error.strerror or str(error)) from None
    try:
        said = json.loads(text) if len(text) <= _LARGEST else None
    except (ValueError, RecursionError):
        raise _unreadable(f"{path} is no config", "it is not JSON, or cut off", "copy the folder anew") from None
    if not isinstance(said, dict):
        raise _unreadable(f"{path} is no config", "a config is a table of settings of bearable size")
    return said


def _of_metadata(header: Header) -> dict[str, Any]:
    """What diffusers' header says; settings stand there behind the name of their part, `transformer.r`."""
    try:
        said = json.loads(header.metadata.get("lora_adapter_metadata", "{}"))
    except (ValueError, RecursionError):
        return {}
    return {key.partition(".")[2] or key: value for key, value in said.items()} if isinstance(said, dict) else {}


def _unreadable(title: str, why: str, *fixes: str) -> Error:
    return Error(Diagnostic("GP631", title, text=(why,), fixes=tuple(filter(None, fixes))))
