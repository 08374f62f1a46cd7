"""`graphpatch export`: write an adapter as a server reads it, or say why that server would not."""

from __future__ import annotations

import argparse

from ..checkpoint.readers.table import READERS
from ..checkpoint.readers.validate import Report
from ..lang.diagnostics import Error
from .model import KINDS, open_tree
from .problem import CannotRun
from .rule_files import add_settings, open_rules
from .terminal import note, print_error, progress

_REFUSED = {"GP635", "GP637"}
"""It could be tried, and the reader would not take what came of it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", metavar="DIR", help="an adapter, as save_adapter or PEFT writes it")
    parser.add_argument("out", metavar="OUT", help="the folder to write to")
    parser.add_argument(
        "--for", "--format", metavar="READER", dest="reader", required=True, help=f"one of {', '.join(READERS)}"
    )
    parser.add_argument(
        "--model", metavar="M", help=f"hold it against this base; an adapter of PEFT needs one; {KINDS}"
    )
    parser.add_argument(
        "--profile", choices=("portable", "peft"), help="as every reader understands it (usual), or as PEFT writes it"
    )
    parser.add_argument("--base", metavar="NAME", help="what the server calls the base, for base_model_name_or_path")
    parser.add_argument(
        "--maps",
        metavar="RULES",
        help="write it for the model that the map statements of this rule file read, where its own rules have none",
    )
    add_settings(parser)
    parser.add_argument("--part", metavar="PART", help="diffusers: unet, transformer, text_encoder ...")


def run(options: argparse.Namespace) -> int:
    tree = open_tree(options.model) if options.model else None
    with progress("importing torch"):
        from ..checkpoint.readers.export import export_adapter
    given = {name: getattr(options, name) for name in ("profile", "base", "part")}
    if options.settings and not options.maps:
        raise CannotRun("GP710", "--set has no effect", "it gives the params of --maps their values")
    given["maps"] = open_rules(options.maps, options.settings) if options.maps else None
    try:
        report = export_adapter(options.adapter, options.out, options.reader, model=tree, **given)
    except Error as error:
        if error.code not in _REFUSED:
            raise
        print_error(error)
        return 1
    print(f"{len(report.adapter.factors)} modules written to {options.out}, as {options.reader} reads them")
    _tell_rank(report, options.reader)
    return 0


def _tell_rank(report: Report, reader: str) -> None:
    rank = report.adapter.number("r")
    if reader == "vllm" and rank is not None and rank > 16:
        note(f"vLLM takes ranks up to 16 by default: start it with --max-lora-rank {_next(int(rank))}")


def _next(rank: int) -> int:
    """The lowest of vLLM's choices that will do."""
    return next((size for size in (32, 64, 128, 256, 320, 512) if size >= rank), rank)
