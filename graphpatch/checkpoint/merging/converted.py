"""Where the parameters of a transformers model lie in files that have other names than its modules.

Transformers 5 fuses while it loads: the files of Mixtral hold `experts.3.w1.weight`, and the model one parameter
`experts.gate_up_proj` for all experts. Which becomes what is asked of the library itself, by the very functions that it
loads with: each tensor of a file is replaced by the numbers of its rows, and where these come out, its rows lie.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from copy import deepcopy
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple

import torch

from ...lang.diagnostics import Diagnostic, Error
from ..base_files import BaseFiles, Slot
from ..hf_model import meta_model, model_type

Run = tuple[str, int, int, int]
"""A tensor's name in the files, a row there, the row of the parameter that it is, and how many follow in both."""


class Turned(NamedTuple):
    """A tensor whose last two dimensions are the other way round in the files."""

    name: str


class Place(NamedTuple):
    """A parameter in the files: the tensor that it is as it stands, or turned, or the runs of rows that it is made of,
    a row being what has all indices but the last in common; None where it is made of them in another way."""

    shape: tuple[int, ...]
    where: str | Turned | list[Run] | None

    @property
    def columns(self) -> int:
        return _width(self.shape)


def converted_places(files: BaseFiles) -> Mapping[str, Place] | None:
    """The parameters of the model, by their names there. None where `config.json` is none of transformers'.

    Raises `Error` (GP645) where transformers is not installed, or does not know the model.
    """
    folder = files.beside
    if model_type(folder) is None:
        return None
    model = meta_model(folder, "the names in the files are not those of the model, which transformers translates")
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

        transforms = get_model_conversion_mapping(model)
    except (ImportError, TypeError) as error:
        title = "the names in the files are not those of the model, and this version of transformers translates none"
        raise Error(Diagnostic("GP645", title, text=(str(error),), fixes=("pip install 'transformers>=5'",))) from None
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    of_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state = model.state_dict()
    prefix = model.base_model_prefix

    places: dict[str, Place] = {}
    parts: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for name in sorted(files.slots, key=dot_natural_key):
        # As `convert_and_load_state_dict_in_model` has it.
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if renamed not in state and name in state:
            renamed, pattern = rename_source_key(name, [], [], base_model_prefix=prefix, meta_state_dict=state)
        if renamed in state and pattern is None:
            places[renamed] = Place(files.slots[name].shape, name)
        elif renamed in state and pattern is not None:
            parts[renamed].append((name, pattern))
    for target, sources in parts.items():
        converter = deepcopy(of_pattern[sources[0][1]])
        places |= _placed(converter, target, sources, files.slots, model, state)
    return places


def _placed(
    converter: Any,
    target: str,
    sources: list[tuple[str, str]],
    slots: Mapping[str, Slot],
    model: Any,
    state: Mapping[str, torch.Tensor],
) -> dict[str, Place]:
    """The parameters that one conversion makes."""
    names = [name for name, _ in sources]
    turned = _turned(converter, [slots[name].shape for name in names], tuple(state[target].shape))
    if turned is not None:
        return {target: Place(tuple(state[target].shape), Turned(names[0]) if turned else names[0])}
    heads = [_head(slots[name].shape) for name in names]
    counts = [prod(head) for head in heads]
    starts = [sum(counts[:i]) for i in range(len(counts))]
    for (name, pattern), head, start, count in zip(sources, heads, starts, counts):
        converter.add_tensor(target, name, pattern, torch.arange(start, start + count).view(head))
    first, *others = converter.target_patterns
    targets = (target, *(target.replace(first, other) for other in others))
    places = {name: Place(tuple(state[name].shape), None) for name in targets if name in state}
    try:
        made = converter.convert(target, model=model, config=model.config)
    except Exception:  # an operation that needs the columns too
        return places
    widths = {_width(slots[name].shape) for name in names}
    for name, numbers in made.items():
        numbers = numbers[0] if isinstance(numbers, list) else numbers
        shape = tuple(state[name].shape) if name in state else ()
        if name in state and widths == {_width(shape)} and tuple(numbers.shape) == _head(shape):
            places[name] = Place(shape, list(_runs(numbers.flatten().tolist(), names, starts, counts)))
    return places


def _turned(converter: Any, shapes: list[tuple[int, ...]], wanted: tuple[int, ...]) -> bool | None:
    """Whether a tensor becomes the parameter by exchanging its last two dimensions; None where another thing is done to
    it, or to several. Asked of the operation, since numbers of rows do not tell."""
    operations = converter.operations
    if len(shapes) != 1 or len(operations) != 1 or type(operations[0]).__name__ != "Transpose":
        return None
    (shape,), (operation,) = shapes, operations
    if getattr(operation, "check_dims", False) and shape == wanted:
        return False
    axes = {operation.dim0 % len(shape), operation.dim1 % len(shape)}
    exchanged = (*shape[:-2], shape[-1], shape[-2]) if len(shape) > 1 else ()
    return True if axes == {len(shape) - 2, len(shape) - 1} and exchanged == wanted else None


def _head(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape with one column; each element of a vector is a row."""
    return (*shape[:-1], 1) if len(shape) > 1 else shape


def _width(shape: tuple[int, ...]) -> int:
    return shape[-1] if len(shape) > 1 else 1


def _runs(numbers: list[int], names: list[str], starts: list[int], counts: list[int]) -> Iterator[Run]:
    """Consecutive rows of one tensor, taken together."""
    owner = [i for i, count in enumerate(counts) for _ in range(count)]
    breaks = [
        i
        for i in range(1, len(numbers))
        if numbers[i] != numbers[i - 1] + 1 or owner[numbers[i]] != owner[numbers[i - 1]]
    ]
    for first, last in pairwise([0, *breaks, len(numbers)]):
        if first < last:
            source = owner[numbers[first]]
            yield names[source], numbers[first] - starts[source], first, last - first
