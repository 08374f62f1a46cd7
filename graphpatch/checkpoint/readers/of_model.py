"""Questions about an adapter and the model it is for. Where no model is known they find nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from ...lang.diagnostics import Error
from ..peft.config import config_of
from ..peft.matching import targets
from ..peft.moe import is_renamed
from .adapter import bare
from .case import Case, Predicate
from .experts import expert, stacks


def kind_outside(*kinds: str) -> Predicate:
    return lambda case: [f"model_type is {case.kind}"] if case.kind not in ("", *kinds) else ()


def taken_apart(name: str, *kinds: str) -> Predicate:
    """A module that the reader has in parts, in models of these kinds."""
    return lambda case: (path for path in case.adapter.factors if case.kind in kinds and path.endswith(f".{name}"))


def unknown_leaf(case: Case) -> Iterator[str]:
    """The last name is that of no module with a weight."""
    known = _leaves(case)
    for one in case.reached:
        if one.node is None and expert(one.path) is None and bare(one.path).rpartition(".")[2] not in known:
            yield f"{one.path}: {one.why}"


def known_leaf_elsewhere(case: Case) -> Iterator[str]:
    """The last name (of an expert, all from `experts` on) is known, and the path is not."""
    known = _leaves(case)
    for one in case.reached:
        if one.node is None and (expert(one.path) is not None or bare(one.path).rpartition(".")[2] in known):
            yield f"{one.path}: {one.why}"


def _leaves(case: Case) -> set[str]:
    tree = case.tree
    if tree is None:
        return set()
    return {tree.names[n] for n in range(len(tree)) if "weight" in tree.signature(n).parameters or stacks(tree, n)}


def no_such_module(case: Case) -> Iterator[str]:
    yield from (f"{one.path}: {one.why}" for one in case.reached if one.node is None)


def without_part(case: Case) -> Iterator[str]:
    """Of diffusers' layout: keys that are paths of the model as they stand."""
    if case.tree is not None:
        yield from (path for path in case.adapter.factors if case.tree.find(path) is not None)


def outside_the_targets(case: Case) -> Iterator[str]:
    """Modules that the adapter has factors for, and that PEFT would not make from the config."""
    given = case.adapter.config.get("target_modules")
    known = (isinstance(given, list) and len(given) <= _MOST) or (
        isinstance(given, str) and given.lower() != "all-linear"
    )
    if not known:
        return
    try:
        config = config_of(case.adapter.config, case.adapter.folder)
        paths = [p for p in case.adapter.factors if p not in case.adapter.fused and not is_renamed(case.kind, p)]
        made = set(targets(config, paths))
    except Error:
        return  # what it is about is another row's
    yield from (path for path in paths if path not in made and expert(path) is None)


_MOST = 1000
"""Names that each of the paths is held against."""


def misfit(case: Case) -> Iterator[str]:
    yield from (f"{one.path}: {one.why}" for one in case.reached if one.node is not None and "wants" in one.why)


def head_is_tied(case: Case) -> Iterator[str]:
    """An adapter of a head that the files do not hold, since it is the embedding."""
    tied = case.tree is not None and any(c.get("tie_word_embeddings") is True for c in case.tree.configs)
    if tied:
        yield from (path for path in case.adapter.factors if path.endswith("lm_head"))


def adds_tokens(case: Case) -> Iterator[str]:
    """`added_tokens.json` names ids past the model's vocabulary."""
    size = _vocabulary(case)
    if "added_tokens.json" not in case.adapter.files or size is None:
        return
    try:
        said = json.loads((Path(case.adapter.folder) / "added_tokens.json").read_bytes()[: 2**24])
    except (OSError, ValueError, RecursionError):
        return  # the reader passes over it too
    for token, number in said.items() if isinstance(said, dict) else ():
        if isinstance(number, int) and number >= size:
            yield f"{str(token)[:40]} is {number}, and the vocabulary has {size}"


def _vocabulary(case: Case) -> int | None:
    configs = case.tree.configs if case.tree is not None else []
    return next((c["vocab_size"] for c in configs if isinstance(c.get("vocab_size"), int)), None)
