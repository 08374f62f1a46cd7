"""What a weight becomes where an update is merged into it, a block of rows at a time.

Given by an op's entry and its tensors alone, so that the same arithmetic merges into a live model and into a file.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from itertools import pairwise
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

BLOCK_ROWS, BLOCK_SIZE = 256, 2**22
"""At most so many rows of a parameter, and about so many of its elements, are worked on at once."""
_FEWEST_ROWS = 64


class Unmergeable(Exception):
    """An update cannot become part of a weight: `str()` says why, `fixes` what to do."""

    def __init__(self, why: str, *fixes: str):
        super().__init__(why)
        self.fixes = fixes


class Merging:
    """What one parameter of the base becomes.

    The parameter is looked at as a matrix of as many columns as `columns` says, its elements in their order: (out, in)
    of a linear, (out, in * kernel) of a convolution, (experts * out, in) of a stack of experts.
    """

    columns: int
    looks: ClassVar[bool] = False
    """Whether it must have seen all rows before it can say what one becomes (a norm over columns)."""

    measures: ClassVar[bool] = False
    """Whether what it adds depends on the base's own rows, as a norm of them does: it must be given those."""

    @property
    def cuts(self) -> Sequence[int]:
        """Rows at which another product begins: no block goes across."""
        return ()

    def look(self, rows: Tensor, start: int) -> None:
        """See the rows from `start` on, as `rows` gets them. Called for all of them first, in order, where `looks`;
        from the first row on it begins anew."""

    def rows(self, rows: Tensor, start: int) -> Tensor:
        """What the rows (n x columns) from `start` on become. They are a copy, in float32, of a float64 base in
        float64, and may be changed in place; the result is rounded to the base's dtype once."""
        raise NotImplementedError

    def limit(self, largest: float) -> float:
        """No element becomes larger than this in absolute value, where none of the base is larger than `largest`. From
        the factors alone, and so perhaps far more than any becomes; infinite where that is not known."""
        return math.inf


class Product(NamedTuple):
    """A part of a parameter, from `row` and `column` on, that gains left (rows x rank) times right (rank x columns)."""

    left: Tensor
    right: Tensor
    row: int = 0
    column: int = 0


class LowRank(Merging):
    """W + s * left @ right, in one or more parts of W."""

    def __init__(self, products: Sequence[Product], scale: float, columns: int):
        self.products, self.scale, self.columns = tuple(products), scale, columns

    @classmethod
    def of(cls, left: Tensor, right: Tensor, scale: float) -> LowRank:
        """One product for the whole parameter."""
        return cls((Product(left, right),), scale, right.shape[1])

    @property
    def cuts(self) -> Sequence[int]:
        return [row for product in self.products for row in (product.row, product.row + len(product.left))]

    def rows(self, rows: Tensor, start: int) -> Tensor:
        stop = start + len(rows)
        for left, right, row, column in self.products:
            first, last = max(start, row), min(stop, row + len(left))
            if first >= last:
                continue
            part = rows[first - start : last - start, column : column + right.shape[1]]
            _add_product(part, left[first - row : last - row].to(rows.dtype), right.to(rows.dtype), self.scale)
        return rows

    def limit(self, largest: float) -> float:
        gains = (
            abs(self.scale) * left.shape[1] * _largest(left) * _largest(right) for left, right, *_ in self.products
        )
        return largest + sum(gains)


def _add_product(rows: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """rows += (left @ right) * scale, with the bits of these three steps."""
    if abs(math.frexp(scale)[0]) == 0.5 and rows.device.type == "cpu":  # a power of two scales without rounding
        threads = torch.get_num_threads()
        if _fuses(tuple(rows.shape), left.shape[1], left.stride(), right.stride(), rows.dtype, threads):
            rows.addmm_(left, right if scale == 1.0 else right * scale)
            return
    delta = workspace("delta", rows.shape[0], rows.shape[1], rows.dtype, rows.device)
    torch.mm(left, right, out=delta)
    if scale != 1.0:
        delta *= scale
    rows += delta


@lru_cache(1000)
def _fuses(
    shape: tuple[int, int], rank: int, left: tuple[int, ...], right: tuple[int, ...], dtype: torch.dtype, threads: int
) -> bool:
    """Whether adding a product to a matrix in one call gives the same bits as making it first, at half the price.

    The library sums in another order for some sizes, ranks and types, and does not say for which; so it is tried.
    """
    draw = torch.Generator().manual_seed(0)
    rows = torch.rand(shape, dtype=dtype, generator=draw)
    b = torch.empty_strided((shape[0], rank), left, dtype=dtype).uniform_(generator=draw)
    a = torch.empty_strided((rank, shape[1]), right, dtype=dtype).uniform_(generator=draw)
    return torch.equal(rows + b @ a, rows.addmm(b, a))


def in_order(mergings: Sequence[Merging]) -> list[Merging]:
    """Of one parameter, the one that measures the base first. Raises `Unmergeable` where two would."""
    ordered = sorted(mergings, key=lambda merging: not merging.measures)
    if len(ordered) > 1 and ordered[1].measures:
        raise Unmergeable(
            "two adapters scale the rows of one weight, each by the base's own lengths (dora=true)",
            "merge one, and leave the other beside it: it then scales what the first has made",
        )
    return ordered


def spans(mergings: Sequence[Merging], first: int, last: int) -> list[tuple[int, int]]:
    """The (start, stop) of the blocks in which the rows from `first` to `last` of a parameter are merged."""
    cuts = {cut for merging in mergings for cut in merging.cuts if first < cut < last}
    edges = [first, *sorted(cuts), last]
    columns = mergings[0].columns
    return [(low + a, low + b) for low, high in pairwise(edges) for a, b in blocks(high - low, columns)]


def blocks(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """The (start, stop) of blocks that cover `rows` rows, of about the same size.

    None is small unless there are few rows at all: a product of a handful of rows is added up in another order than
    the same rows of a large one, and the result shall be that of the whole matrix, bit for bit.
    """
    size = max(_FEWEST_ROWS, min(BLOCK_ROWS, BLOCK_SIZE // max(1, columns)))
    count = max(1, rows // size + (rows % size > 0))
    for i in range(count if rows else 0):
        yield rows * i // count, rows * (i + 1) // count


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which the rows of a base of this dtype are merged."""
    return torch.float64 if dtype == torch.float64 else torch.float32


Spans = Sequence[tuple[int, int]]
"""(start, stop) of blocks of rows."""
Read = Callable[[int, int], Tensor]
"""From start and stop to a copy of these rows, in `working_dtype`."""


def merge_blocks(mergings: Sequence[Merging], where: Spans, read: Read, write: Callable[[int, Tensor], object]) -> None:
    """Merge all of them into the rows of one parameter, one after the other without rounding in between;
    `write(start, rows)` gets what the rows become, still in `working_dtype`."""
    with torch.no_grad():
        for start, stop in where:
            write(start, _become(mergings, read(start, stop), start))


def look_at_all(mergings: Sequence[Merging], where: Spans, read: Read) -> None:
    """Before that: show those of them that must see all rows first what they will get."""
    with torch.no_grad():
        for number, merging in enumerate(mergings):
            for start, stop in where if merging.looks else ():
                merging.look(_become(mergings[:number], read(start, stop), start), start)


def _become(mergings: Sequence[Merging], rows: Tensor, start: int) -> Tensor:
    for merging in mergings:
        rows = merging.rows(rows, start)
    return rows


@contextmanager
def exact_arithmetic(*devices: str) -> Iterator[None]:
    """Products of float32 in float32, whatever the caller trains with: no autocast, no TF32 or bfloat16 inside."""
    precision = torch.get_float32_matmul_precision()
    with ExitStack() as stack:
        for device in devices:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if precision != "highest":
            torch.set_float32_matmul_precision("highest")
            stack.callback(torch.set_float32_matmul_precision, precision)
        stack.callback(_kept.by_kind.clear)
        yield


@contextmanager
def one_thread_each() -> Iterator[int]:
    """Within, each thread computes alone; gives how many there may be. Blocks are small, so that threads which share
    the work on one would wait for each other more than they gain, and far more where others use the machine too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield max(1, min(threads, 8))
    finally:
        torch.set_num_threads(threads)


def all_done(works: Iterable[Callable[[], object]], threads: int) -> None:
    """Call each, on so many threads. What one raises is raised, and what has not begun by then does not begin."""
    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(work) for work in works]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


class _Kept(threading.local):
    def __init__(self) -> None:
        self.by_kind: dict[tuple, Tensor] = {}


_kept = _Kept()


def workspace(name: str, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory for a block; the same for the same name, and gone when `exact_arithmetic` ends. To get and
    return some for each block would take as long as to fill it."""
    kind = (name, dtype, device, torch.is_inference_mode_enabled())
    flat: Tensor | None = _kept.by_kind.get(kind)
    if flat is None or flat.numel() < rows * columns:
        flat = _kept.by_kind[kind] = torch.empty(rows * columns, dtype=dtype, device=device)
    return flat[: rows * columns].view(rows, columns)


def not_finite(tensor: Tensor) -> bool:
    """Whether there is a NaN or an infinity in it. The extremes tell, at a hundredth of what looking at each costs."""
    if not tensor.numel():
        return False
    low, high = torch.aminmax(tensor)
    return not (math.isfinite(low) and math.isfinite(high))


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0
