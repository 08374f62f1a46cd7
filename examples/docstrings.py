"""English text that every Python has: the docstrings of its own standard library, read from source, never imported."""

from __future__ import annotations

import ast
import random
import re
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_SKIPPED = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "site-packages",
    "dist-packages",
    "ensurepip",
    "pydoc_data",
    "turtledemo",
}
_SENTENCE = re.compile(r"[A-Z][a-z]+(?: [a-zA-Z'-]+,?){6,24} [a-z]+\.")
_WORD = re.compile(r"[a-z]+")


class Example(NamedTuple):
    text: str
    label: int
    """1 where two adjacent words were swapped, 0 where the sentence is as its author wrote it."""


def docstrings() -> tuple[list[str], list[str]]:
    """Docstrings on one line each, of training modules and of held-out ones (every fourth, by a hash of its name)."""
    library = Path(sysconfig.get_path("stdlib"))
    training: list[str] = []
    held_out: list[str] = []
    for file in sorted(library.rglob("*.py")):
        module = file.relative_to(library)
        if _SKIPPED.isdisjoint(module.parts):
            part = training if _stable_hash(module.as_posix()) % 4 else held_out
            part.extend(_docstrings_of(file))
    return training, held_out


def word_order(train: int, test: int) -> tuple[list[Example], list[Example]]:
    """A task that needs syntax: sentences, and the same ones with two adjacent words swapped, half and half.

    The test sentences come from held-out modules; those that a training module has too are left out.
    """
    training, held_out = (_sentences(texts) for texts in docstrings())
    return _examples(training, train), _examples(held_out - training, test)


def _sentences(texts: list[str]) -> set[str]:
    """Plain English sentences of 8 to 26 words."""
    return {sentence for text in texts for sentence in _SENTENCE.findall(text)}


def _examples(sentences: set[str], count: int) -> list[Example]:
    in_stable_order = sorted(sentences, key=_stable_hash)
    pairs = [(text, other) for text in in_stable_order if (other := _swap_two_words(text))]
    return [Example(text, label) for pair in pairs[: count // 2] for label, text in enumerate(pair)]


def _docstrings_of(file: Path) -> Iterator[str]:
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # a few library files are broken on purpose
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield " ".join((ast.get_docstring(node) or "").split())


def _swap_two_words(sentence: str) -> str | None:
    """Two neighbours change places, neither first nor last, so that no capital or full stop gives it away."""
    words = sentence.split(" ")
    places = [i for i in range(1, len(words) - 2) if _may_swap(words[i], words[i + 1])]
    if not places:
        return None
    i = random.Random(_stable_hash(sentence)).choice(places)
    words[i], words[i + 1] = words[i + 1], words[i]
    return " ".join(words)


def _may_swap(left: str, right: str) -> bool:
    return left != right and bool(_WORD.fullmatch(left) and _WORD.fullmatch(right))


def _stable_hash(text: str) -> int:
    """The same on every machine and in every run, unlike `hash`."""
    return zlib.crc32(text.encode())
