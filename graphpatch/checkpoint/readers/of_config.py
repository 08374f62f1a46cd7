"""Questions about what the directory is, and what its config says."""

from __future__ import annotations

import re
from collections.abc import Iterator

from .adapter import CONFIG, WEIGHTS, Layout
from .case import Case, Predicate


def is_no(layout: Layout) -> Predicate:
    """The directory is another's."""

    def witnesses(case: Case) -> Iterator[str]:
        if case.adapter.layout != layout:
            yield f"it holds {WEIGHTS[case.adapter.layout]}, and no {WEIGHTS[layout]}"

    return witnesses


def beside_a_model(case: Case) -> Iterator[str]:
    if "config.json" in case.adapter.files:
        yield "config.json is there too"


def lacks(*names: str) -> Predicate:
    """A setting is missing, or of a kind that nobody can compute with."""

    def witnesses(case: Case) -> Iterator[str]:
        for name in names:
            value = case.adapter.config.get(name)
            if value is None:
                yield f"{name} is missing"
            elif name == "r" and not (isinstance(value, int) and not isinstance(value, bool) and value > 0):
                yield f"r is {str(value)[:40]}"
            elif name == "lora_alpha" and case.adapter.number(name) is None:
                yield f"lora_alpha is {str(value)[:40]}"
            elif name == "target_modules" and not isinstance(value, (list, str)):
                yield f"target_modules is {str(value)[:40]}"

    return witnesses


def switched_on(*names: str) -> Predicate:
    """A setting that asks for something special."""

    def witnesses(case: Case) -> Iterator[str]:
        for name in names:
            if case.adapter.config.get(name):
                yield f"{name}: {str(case.adapter.config[name])[:60]}"

    return witnesses


def no_lora(case: Case) -> Iterator[str]:
    kind = case.adapter.config.get("peft_type")
    if str(kind).upper() != "LORA":
        yield f"peft_type is {str(kind)[:40]}"


def init_outside(*known: str) -> Predicate:
    """An init that is named, and whose name the reader does not know."""

    def witnesses(case: Case) -> Iterator[str]:
        init = case.adapter.config.get("init_lora_weights", True)
        if isinstance(init, str) and init not in known:
            yield f"init_lora_weights: {init[:40]}"

    return witnesses


def saves_modules_outside(*known: str) -> Predicate:
    def witnesses(case: Case) -> Iterator[str]:
        for name in case.adapter.words("modules_to_save"):
            if name not in known:
                yield name[:60]

    return witnesses


def target_is_a_regex(case: Case) -> Iterator[str]:
    said = case.adapter.config.get("target_modules")
    if isinstance(said, str) and said not in ("all", "all-linear"):
        yield f"target_modules: {said[:60]}"


def targets_outside(*known: str) -> Predicate:
    """A name in the list of targets whose end the reader does not know."""

    def witnesses(case: Case) -> Iterator[str]:
        yield from (name[:80] for name in case.adapter.words("target_modules") if name.rpartition(".")[2] not in known)

    return witnesses


# ── mlx-lm ──


def mlx_settings(case: Case) -> Iterator[str]:
    config = case.adapter.config
    said = config.get("lora_parameters")
    if not isinstance(config.get("num_layers"), int):
        yield f"{CONFIG} has no num_layers"
    if not isinstance(said, dict):
        yield f"{CONFIG} has no lora_parameters"
        return
    for name in ("rank", "scale", "dropout"):
        if not isinstance(said.get(name), (int, float)) or isinstance(said.get(name), bool):
            yield f"lora_parameters has no {name}"
    ranks = {f.rank for f in case.adapter.factors.values() if f.a is not None and len(f.a.shape) == 2}
    yield from (f"a rank of {r}, and lora_parameters says {said.get('rank')}" for r in ranks - {said.get("rank")})


def mlx_keys(case: Case) -> Iterator[str]:
    """Modules that `keys` do not turn into LoRA layers: by their path in a block, or in the model."""
    said = case.adapter.config.get("lora_parameters")
    keys = said.get("keys") if isinstance(said, dict) else None
    if not isinstance(keys, list):
        return
    for path in case.adapter.factors:
        in_block = re.sub(r".*?layers\.\d+\.", "", path, count=1)
        if path not in keys and in_block not in keys:
            yield path
