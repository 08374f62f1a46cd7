"""What `--model` names, as a `Tree`: a Hugging Face config, a `.tree`, safetensors, `package.module:callable`."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from ..lang.diagnostics import Error, did_you_mean
from ..tree.headers import read_headers
from ..tree.tree import Tree
from .problem import CannotRun
from .terminal import progress

KINDS = (
    "a model is named by: a Hugging Face directory or its config.json, a .tree file, a safetensors file or a directory "
    "of them, or package.module:callable"
)
_CALLABLE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="M", required=True, help=KINDS.replace("a model is named by: ", ""))


def open_tree(name: str) -> Tree:
    """The tree of what `name` names. No weights are read, no hub is asked; raises `CannotRun` (GP7xx, GP43x)."""
    path = Path(name).expanduser()
    try:
        if name and path.is_dir():
            return _of_directory(path)
        if path.is_fifo():  # a shell's <(graphpatch tree --model M)
            return Tree.from_text(path.read_text(encoding="utf-8", errors="replace"), name)
        if name and path.exists():
            return _of_file(path)
    except CannotRun:
        raise
    except Error as error:
        raise CannotRun.because(error) from None
    if _CALLABLE.fullmatch(name):
        from .named import build_named

        return build_named(name)
    raise _not_there(name, path)


def _of_directory(path: Path) -> Tree:
    config, weights = path / "config.json", any(path.glob("*.safetensors"))
    if config.is_file():
        return _of_config(config, weights)
    if weights:
        return _of_headers(path)
    if (path / "adapter_config.json").is_file():
        raise CannotRun(
            "GP702",
            f"{path} holds an adapter, and no model",
            "give the directory of the model that the adapter belongs to",
        )
    trees = sorted(p.name for p in path.glob("*.tree"))
    raise CannotRun(
        "GP702",
        f"{path} has neither a config.json nor safetensors",
        f"it has {', '.join(trees[:5])}: name the file" if trees else KINDS,
    )


def _of_file(path: Path) -> Tree:
    if path.name.endswith((".safetensors", ".safetensors.index.json")):
        return _of_headers(path)
    if path.suffix == ".json":
        return _of_config(path, weights=False)
    if path.suffix == ".tree" or _begins_with(path, b"graphpatch tree"):
        with progress(f"reading {path.name}"):
            return Tree.read(str(path))
    if path.suffix == ".rules":
        raise CannotRun("GP702", f"{path} is a rule file, and --model wants a model", KINDS)
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".pkl"):
        fix = "give the model's config.json, or package.module:callable that builds it"
        raise CannotRun("GP702", f"{path} is a {path.suffix} file, and those are not opened", fix)
    raise CannotRun("GP702", f"{path} is no model that graphpatch knows", KINDS)


def _begins_with(path: Path, start: bytes) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(start)) == start
    except OSError:
        return False


def _of_config(config: Path, weights: bool) -> Tree:
    from .huggingface import NoTransformersModel, build

    try:
        return build(config)
    except NoTransformersModel:
        if weights:
            return _of_headers(config.parent)
        raise


def _of_headers(path: Path) -> Tree:
    for file in path.glob("*.safetensors") if path.is_dir() else [path]:
        if _begins_with(file, b"version https://git-lfs"):
            raise CannotRun("GP706", f"{file} is a Git LFS pointer: the file itself was never fetched", "git lfs pull")
    return read_headers(str(path))


def _not_there(name: str, path: Path) -> CannotRun:
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).parent.is_dir():
        return CannotRun(
            "GP701",
            f"there is no file or directory `{name}`",
            "if it names a model of a hub: hubs are not contacted; download it and give its local directory",
            "its config.json alone is enough",
        )
    return CannotRun("GP701", f"there is no file or directory `{name}`", near_file(path), KINDS)


def near_file(path: Path, pattern: str = "*") -> str:
    """`did you mean` another entry of the same directory."""
    try:
        names = [p.name for p in path.parent.glob(pattern)]
    except OSError:
        names = []
    return did_you_mean(path.name, names)
