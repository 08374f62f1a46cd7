"""Which modules and parameters a config reaches, as terms: its lists, regexes and layers, less what it excludes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from .config import LoraConfig, refuse
from .matching import safe
from .terms import PARAMETER, End, Pattern, Term, both, full_term, less, pattern_term

ALL_LINEAR = "all-linear"
_LINEAR = "torch.nn.Linear"
_UNCALLED = "torch.nn.modules.linear.NonDynamicallyQuantizableLinear"
"""The output projection of `nn.MultiheadAttention`, whose weight is read without a call: an adapter has no effect."""
_LINEARS = "{torch.nn.Linear,transformers.pytorch_utils.Conv1D}"
_HEADS = (
    "lm_head", "lm_head.decoder", "lm_head.out_proj", "language_model.lm_head", "cls.predictions.decoder",
    "predictions.decoder", "generator_lm_head", "output_projection", "proj_out", "embed_out", "pred_layer.proj",
    "decoder", "decoder.cls.predictions.decoder", "decoder.lm_head", "head", "head.decoder", "lm_loss", "output",
    "vocab_projector",
)  # fmt: skip
"""Where the models of Transformers 5 have what their `get_output_embeddings` gives."""
_CLASSIFIERS = ("score", "classifier")
_MOST_INDICES = 40
"""In one regex, which may have 500 characters."""


class Cell(NamedTuple):
    """Targets of one rank and alpha: what is in one of the terms, and in none of those of earlier cells."""

    rank: int
    alpha: float
    terms: list[Term]


def module_terms(config: LoraConfig) -> list[Term]:
    """What `target_modules` names, of the layers that count, less what no name excludes. Empty for none."""
    return _less_excluded(config, _named_terms(config))


def _named_terms(config: LoraConfig) -> list[Term]:
    given = config.target_modules
    if given is None:
        return []
    if isinstance(given, str):
        if is_all_linear(config):
            return [Pattern((".*",), _LINEARS)]
        return [full_term(safe(given))]
    terms: list[Term] = []
    for name in dict.fromkeys(filter(None, given)):
        if config.layers is None:
            terms.append(End(name))
        else:
            # The whole name counts in every layer.
            terms.append(End(name, anchored=True))
            terms += [Pattern((layer, rf".*\.{re.escape(name)}")) for layer in _layers(config)]
    return terms


def parameter_terms(config: LoraConfig) -> list[Term]:
    return [End(name, cls=PARAMETER) for name in dict.fromkeys(filter(None, config.target_parameters or []))]


def owner(term: Term) -> Term | None:
    """The linears whose weights these parameters may be."""
    if not isinstance(term, End) or not term.name.endswith(".weight"):
        return None
    return End(term.name.removesuffix(".weight"), term.anchored, _LINEAR)


def _layers(config: LoraConfig) -> Iterator[str]:
    """Regexes for names whose first index is one of the layers."""
    wanted = sorted({index for index in config.layers or () if index >= 0})
    chunks = [wanted[at : at + _MOST_INDICES] for at in range(0, len(wanted), _MOST_INDICES)]
    before = ""
    for pattern in config.patterns or ("",):
        if pattern and not re.fullmatch(r"(?:[\w-]|\\?\.)+", pattern):
            refuse(
                "the config",
                "layers_pattern",
                f"`{pattern}` is a regular expression, which PEFT puts into another without a bracket around it",
                "give the names of the lists of layers: layers, h",
            )
        for chunk in chunks:
            index = rf"(?:{'|'.join(map(str, chunk))})\..*"
            if pattern:
                yield rf"{before}(?:(?!{pattern}\.\d+\.)[^.]*\.)*{pattern}\.{index}"
            else:
                # An index at the very beginning of a name does not count.
                yield rf"[^.]*\.[^.]*\.(?:(?!\d+\.)[^.]*\.)*{index}"
        before += rf"(?!(?:.*\.)?{pattern}\.\d+\.)"


def excluded_terms(config: LoraConfig, among: Sequence[Term]) -> list[Term]:
    """What `exclude_modules` takes away from these by its names, which are longer than those that are targets."""
    given = config.exclude_modules
    names = [End(name) for name in given if name] if isinstance(given, list) else []
    return [found for one in among for name in names if isinstance(found := both(one, name), End)]


def _less_excluded(config: LoraConfig, terms: Sequence[Term]) -> list[Term]:
    """The terms, less what `exclude_modules` takes away from them and no name says. A module that is excluded may hold
    targets, so that no `except` will do, which covers what is below it."""
    given = config.exclude_modules
    if isinstance(given, str):
        return [left for one in terms if (left := less(one, full_term(safe(given)))) is not None]
    for name in filter(None, given or []):
        end = End(name)
        terms = [one for one in terms if both(one, end) != one]
        terms = [one if isinstance(both(one, end), End) else less(one, end) or one for one in terms]
    return list(terms)


def is_all_linear(config: LoraConfig) -> bool:
    return isinstance(config.target_modules, str) and config.target_modules.lower() == ALL_LINEAR


def spared_terms(config: LoraConfig, heads: bool = True) -> list[Term]:
    """What `modules_to_save` and `all-linear` keep from being targets, with all below it."""
    terms: list[Term] = []
    for key in config.modules_to_save or []:
        plain = re.fullmatch(r"[\w-]+", key)
        terms.append(End(key) if plain else Pattern((rf"(?:^|.*\.){safe(key)}(?:$|\..*)",)))
    if is_all_linear(config):
        names = (*_HEADS, *_CLASSIFIERS) if config.task_type == "SEQ_CLS" else _HEADS
        terms += [End(name, anchored=True, cls=_LINEARS) for name in names if heads]
        terms.append(Pattern((".*",), _UNCALLED))
    return terms


def saved_terms(config: LoraConfig) -> list[Term]:
    """What `modules_to_save` trains: all modules whose names end in its letters, `lm_head` with `head`."""
    return [Pattern((rf".*{re.escape(key)}",)) for key in dict.fromkeys(config.modules_to_save or []) if key]


def cells(config: LoraConfig, terms: Sequence[Term]) -> list[Cell]:
    """The terms, parted by `rank_pattern` and `alpha_pattern`: the first key that matches counts, in each."""
    ranks = [(pattern_term(safe(k)), v) for k, v in config.rank_pattern.items()] + [(None, config.r)]
    alphas = [(pattern_term(safe(k)), v) for k, v in config.alpha_pattern.items()] + [(None, config.lora_alpha)]
    found: list[Cell] = []
    taken: set[Term] = set()
    for rank_term, rank in ranks:
        for alpha_term, alpha in alphas:
            inside = [t for term in terms for t in _within(term, rank_term, alpha_term) if t not in taken]
            if inside:
                found.append(Cell(rank, alpha, list(dict.fromkeys(inside))))
                taken.update(inside)
    return found


def _within(term: Term, *others: Term | None) -> list[Term]:
    for other in others:
        inside = both(term, other) if other is not None else term
        if inside is None:
            return []
        term = inside
    return [term]
