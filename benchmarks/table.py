"""How the benchmarks measure and print: CPU time, the least of several runs, and ratios beside their goals."""

from __future__ import annotations

import gc
from collections.abc import Callable
from time import process_time


def least(run: Callable[[], object], after: Callable[[], object] = lambda: None, repeats: int = 5) -> float:
    """Seconds of the fastest of several runs; `after` undoes what a run did, outside the clock."""
    best = float("inf")
    for _ in range(repeats):
        gc.collect()
        start = process_time()
        result = run()
        best = min(best, process_time() - start)
        del result
        after()
    return best


def row(name: str, figure: float, unit: str = "s", goal: str = "") -> None:
    """One line of a table: what, how much, and what it should be."""
    shown = f"{figure:.1f}" if figure >= 100 else f"{figure:.3f}" if unit in ("s", "ms") else f"{figure:.2f}"
    print(f"{name:<60}{shown:>9} {unit:<6}{goal}")
