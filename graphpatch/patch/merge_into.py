"""The arithmetic of merging into weights of a live model, a block of rows at a time."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor

from ..lang.diagnostics import ApplyError, Diagnostic
from ..rewrites.merging import (
    all_done,
    blocks,
    exact_arithmetic,
    look_at_all,
    merge_blocks,
    not_finite,
    one_thread_each,
    spans,
    working_dtype,
    workspace,
)
from .coded import decoded, is_coded, put
from .live_weights import writable
from .mergeable import Weight


def each(weights: Sequence[Weight], do: Callable[[int], None]) -> None:
    """Call it with the number of each weight, on several threads where they are in this machine's own memory."""
    if any(weight.tensor.device.type != "cpu" for weight in weights):
        for at in range(len(weights)):
            do(at)
        return
    with one_thread_each() as threads:
        all_done([partial(do, at) for at in range(len(weights))], threads)


def merge_into(weight: Weight) -> None:
    coded = is_coded(weight.place)
    tensor = decoded(weight.place).float() if coded else weight.tensor
    with writable(tensor):
        matrix = tensor.reshape(-1, weight.mergings[0].columns)
        _merge_rows(weight, matrix, lambda start, rows: matrix[start : start + len(rows)].copy_(rows))
        if matrix.data_ptr() != tensor.data_ptr():  # its elements lie in another order (channels last), so it is a copy
            tensor.copy_(matrix.view(tensor.shape))
        if coded:
            put(weight.place, tensor)


def refuse_infinite(weight: Weight) -> None:
    tensor = decoded(weight.place) if is_coded(weight.place) else weight.tensor
    largest = 0.0
    with writable(tensor):
        matrix = tensor.reshape(-1, weight.mergings[0].columns)
        for start, stop in blocks(*matrix.shape):
            low, high = torch.aminmax(matrix[start:stop])
            largest = max(largest, -float(low), float(high)) if math.isfinite(low + high) else math.nan
        limit = largest
        for merging in weight.mergings:
            limit = merging.limit(limit)
        if limit < torch.finfo(tensor.dtype).max:
            return
        infinite: list[int] = []

        def look(start: int, rows: Tensor) -> None:
            if not_finite(rows.to(tensor.dtype)):
                infinite.append(start)

        _merge_rows(weight, matrix, look)
    if infinite:
        why = "the base has such a value already" if math.isnan(largest) else "the update does not fit its dtype"
        raise ApplyError(
            Diagnostic(
                "GP533",
                f"merged, `{weight.path}` would hold a NaN or an infinity: {why}",
                text=(f"in rows from {infinite[0]} on, in {str(tensor.dtype).removeprefix('torch.')}",),
                fixes=("look at the factors: patch.adapter_state_dict()", "or merge in a wider dtype: model.float()"),
            )
        )


def warn_of_codes(weights: Sequence[Weight]) -> None:
    coded = [weight.path for weight in weights if is_coded(weight.place)]
    if coded:
        warnings.warn(
            f"graphpatch: `{coded[0]}` and {len(coded) - 1} more are quantised, and are so again after merging: the "
            "sum is rounded to codes anew, so outputs change a little. merge_checkpoint takes the base as it was.",
            stacklevel=4,
        )


def _merge_rows(weight: Weight, matrix: Tensor, write: Callable[[int, Tensor], object]) -> None:
    dtype = working_dtype(matrix.dtype)

    def read(start: int, stop: int) -> Tensor:
        return workspace("rows", stop - start, matrix.shape[1], dtype, matrix.device).copy_(matrix[start:stop])

    where = spans(weight.mergings, 0, len(matrix))
    look_at_all(weight.mergings, where, read)
    merge_blocks(weight.mergings, where, read, write)


def exactly(weights: Sequence[Weight]) -> AbstractContextManager[None]:
    return exact_arithmetic(*{weight.tensor.device.type for weight in weights})
