"""`graphpatch merge`: a checkpoint with an adapter merged into its weights, written anew."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..checkpoint.merging.merge import merge_checkpoint
from .terminal import note


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "base", metavar="BASE", help="a directory of safetensors (or one such file): the base's weights"
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="a directory that save_adapter wrote, or an adapter of PEFT")
    parser.add_argument("out", metavar="OUT", help="where to write; nothing may be there yet")
    parser.add_argument(
        "--sync", action="store_true", help="wait until the disk has it all, for the case that the power fails"
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress, no closing line")


def run(options: argparse.Namespace) -> int:
    start = time.monotonic()
    with _bar(f"merging {options.adapter}", quiet=options.quiet) as progress:
        merge_checkpoint(options.base, options.adapter, options.out, sync=options.sync, progress=progress)
    if not options.quiet:
        note(f"written to {options.out} in {time.monotonic() - start:.1f} s")
    return 0


@contextmanager
def _bar(doing: str, quiet: bool) -> Iterator[Callable[[int, int], object] | None]:
    """Bytes written, on a terminal: by tqdm where that is installed, else a percentage."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    try:
        from tqdm import tqdm
    except ImportError:
        with _percentage(doing) as show:
            yield show
        return
    with tqdm(desc=doing, unit="B", unit_scale=True, unit_divisor=1024, leave=False) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show


@contextmanager
def _percentage(doing: str) -> Iterator[Callable[[int, int], object]]:
    shown = -1

    def show(done: int, total: int) -> None:
        nonlocal shown
        percent = 100 * done // total if total else 100
        if percent != shown:
            shown = percent
            sys.stderr.write(f"\r\x1b[K{doing} {percent} %")
            sys.stderr.flush()

    try:
        yield show
    finally:
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()
