"""Questions about the names of tensors, their ranks, and the scale that goes with them."""

from __future__ import annotations

import re
from collections.abc import Iterator

from .adapter import PREFIX, Adapter, bare
from .case import Case, Predicate
from .of_config import switched_on


def has_dora(case: Case) -> Iterator[str]:
    yield from switched_on("use_dora")(case)
    yield from (key for key in case.adapter.others if "lora_magnitude_vector" in key)


def has_dora_on_experts(case: Case) -> Iterator[str]:
    yield from (k for k in case.adapter.others if "lora_magnitude_vector" in k and ".experts." in k)


def has_bias(case: Case) -> Iterator[str]:
    bias = case.adapter.config.get("bias", "none")
    if bias not in ("none", None):
        yield f"bias: {str(bias)[:40]}"
    yield from switched_on("lora_bias")(case)
    yield from (key for key in case.adapter.others if key.endswith(".bias"))


def has_token_deltas(case: Case) -> Iterator[str]:
    yield from switched_on("trainable_token_indices")(case)
    yield from (key for key in case.adapter.others if "trainable_tokens" in key)


def other_keys(allowed: str) -> Predicate:
    """Tensors that are no factor, and not of the kind that the reader knows."""
    known = re.compile(allowed)
    return lambda case: (key for key in case.adapter.others if not known.search(key))


def keys_unlike(pattern: str, but: tuple[str, ...] = ()) -> Predicate:
    """Tensors whose whole name is not of the form that the reader takes apart; `but` names parts it lets pass."""
    known = re.compile(pattern)
    return lambda case: (
        key for key in case.adapter.keys if not known.match(key) and not any(part in key for part in but)
    )


def keys_with(*parts: str) -> Predicate:
    return lambda case: (key for key in case.adapter.keys if any(part in key for part in parts))


def keys_without_prefix(case: Case) -> Iterator[str]:
    if case.adapter.layout == "peft":
        yield from (key for key in case.adapter.keys if not key.startswith(PREFIX))


def lone_factors(case: Case) -> Iterator[str]:
    for one in case.adapter.factors.values():
        if one.a is None or one.b is None:
            yield f"{one.path} has no lora_{'A' if one.a is None else 'B'}"


def embeddings_outside_the_targets(case: Case) -> Iterator[str]:
    targets = {name.rpartition(".")[2] for name in case.adapter.words("target_modules")}
    whole = isinstance(case.adapter.config.get("target_modules"), str)
    for key in case.adapter.keys:
        name = next((n for n in ("embed_tokens", "lm_head") if n in key), None)
        if name is not None and name not in targets and not whole:
            yield key


def outside_numbered_layers(case: Case) -> Iterator[str]:
    """Paths without `layers.N.`, which is how a reader tells where a weight belongs."""
    for path in case.adapter.factors:
        if not re.search(r"layers\.\d+\.", path) and not re.search("embed_tokens|lm_head", path):
            yield path


def without(partner: str, name: str, where_there_is_one: bool = False) -> Predicate:
    """`partner` is missing beside a `name` of the same block; or only where the model has such a partner."""

    def witnesses(case: Case) -> Iterator[str]:
        for path in case.adapter.factors:
            block, _, leaf = path.rpartition(".")
            other = f"{block}.{partner}"
            if leaf != name or other in case.adapter.factors:
                continue
            if not where_there_is_one or case.tree is None or case.tree.find(other) is not None:
                yield f"{path} without {partner}"

    return witnesses


def names_outside(*known: str) -> Predicate:
    def witnesses(case: Case) -> Iterator[str]:
        for path in case.adapter.factors:
            if bare(path).rpartition(".")[2] not in known:
                yield path

    return witnesses


def one_layer_twice(case: Case) -> Iterator[str]:
    """Paths that are one to a reader that sees the number of a layer and the last names alone."""
    seen: dict[tuple[str, ...], str] = {}
    for path in case.adapter.factors:
        part = re.fullmatch(r"(.*)\.(\d+)\.(\w+\.(?:\w+|\w+\.\w+|\w+\.\d+\.\w+))", path)
        if part is not None and seen.setdefault((part[2], part[3]), path) != path:
            yield f"{seen[part[2], part[3]]} and {path}"


# ── ranks and scales ──


def rank_above(default: int | None) -> Predicate:
    """A rank above that which the server was started with, or its own default."""

    def witnesses(case: Case) -> Iterator[str]:
        limit = case.max_rank or default
        ranks = {path: case.adapter.rank(path) for path in case.adapter.factors}
        highest = max((r for r in [*ranks.values(), case.adapter.number("r")] if r is not None), default=0)
        if limit is not None and highest > limit:
            yield f"rank {highest:g}, and at most {limit} are served"

    return witnesses


def rank_is_not_r(case: Case) -> Iterator[str]:
    r = case.adapter.number("r")
    for path in case.adapter.factors:
        rank = case.adapter.rank(path)
        if rank is not None and r is not None and rank != r and path not in case.adapter.fused:
            yield f"{path} has rank {rank:g}, and r is {r:g}"


def rank_is_not_as_configured(case: Case) -> Iterator[str]:
    for path, one in case.adapter.factors.items():
        said = case.adapter.configured_rank(path)
        if path not in case.adapter.fused and one.rank and said and one.rank != said:
            yield f"{path} has rank {one.rank}, and the config says {said:g}"


def rank_above_sizes(case: Case) -> Iterator[str]:
    for one in case.adapter.factors.values():
        if one.a is None or one.b is None or not len(one.a.shape) == len(one.b.shape) == 2:
            continue
        if one.rank is not None and one.rank > min(one.a.shape[1], one.b.shape[0]):
            yield f"{one.path} has rank {one.rank}"


def scale_is_not(alpha_over: str) -> Predicate:
    """The reader multiplies by another number than PEFT does: alpha over `r` of the config, the `rank` of the tensors,
    or that with rsLoRA's root, `rank or root`."""

    def theirs(adapter: Adapter, path: str) -> float | None:
        alpha = adapter.number("lora_alpha")
        rank = adapter.number("r") if alpha_over == "r" else adapter.rank(path)
        if alpha is None or not rank or rank < 0:
            return None
        rooted = alpha_over == "rank or root" and adapter.config.get("use_rslora")
        return alpha / (rank**0.5 if rooted else rank)

    def witnesses(case: Case) -> Iterator[str]:
        for path in case.adapter.factors:
            meant, taken = case.adapter.scale(path), theirs(case.adapter, path)
            if meant is not None and taken is not None and abs(meant - taken) > 1e-6 * abs(meant):
                yield f"{path} is meant times {meant:.4g}, and taken times {taken:.4g}"

    return witnesses
