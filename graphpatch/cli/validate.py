"""`graphpatch validate`: which servers read an adapter, which refuse or misread it, and does it have an effect?"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..checkpoint.readers.adapter import Adapter
from ..checkpoint.readers.table import READERS
from ..checkpoint.readers.validate import Report, readers_of, validate_adapter
from ..lang.diagnostics import Error
from .model import KINDS, open_tree
from .problem import CannotRun
from .terminal import BOLD, GREEN, RED, YELLOW, color_on, paint

_PAINT = {"accepted": GREEN, "refused": RED, "misread": YELLOW}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "adapter", metavar="DIR", help="a folder with an adapter, as PEFT, mlx-lm or diffusers write it"
    )
    parser.add_argument(
        "--model", metavar="M", help=f"the base; that which the adapter names, where it is here; {KINDS}"
    )
    parser.add_argument(
        "--for", metavar="READERS", dest="readers", default="vllm,sglang,trtllm,llamacpp,peft",
        help=f"of {', '.join(READERS)}; by default %(default)s",
    )  # fmt: skip
    parser.add_argument("--max-rank", metavar="N", type=_positive, help="what the server was started with")
    parser.add_argument("--json", action="store_true", help="verdicts and findings as JSON")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def run(options: argparse.Namespace) -> int:
    try:
        readers, adapter = readers_of(options.readers), Adapter.read(options.adapter)
    except Error as error:
        raise CannotRun.because(error) from None
    foreign = adapter.layout == "graphpatch"
    tree = None if foreign else open_tree(options.model or _named(adapter))
    report = validate_adapter(adapter, tree, readers, max_rank=options.max_rank)
    if options.json:
        print(json.dumps(report.to_json(), indent=1))
    else:
        _print(report)
    return 0 if report.clean else 1


def _named(adapter: Adapter) -> str:
    """The base that the adapter names, where that is a directory here; nothing else that a file says is followed."""
    name = adapter.config.get("base_model_name_or_path")
    if isinstance(name, str) and name and Path(name).is_dir():
        return name
    says = f"the adapter names `{name[:80]}`, which is not here" if isinstance(name, str) else "the adapter names none"
    raise CannotRun("GP701", "which model is the adapter for?", "--model M", text=(says,))


def _print(report: Report) -> None:
    for diagnostic in report.diagnostics:
        print(diagnostic.render(color_on()), end="\n\n")
    print(paint(f"{report.effective} of {len(report.adapter.factors)} modules have an effect on this model", BOLD))
    column = max(map(len, report.readers))
    for reader in report.readers:
        verdict = report.verdict(reader)
        print(f"  {reader:{column}}  {paint(verdict, _PAINT[verdict])}")
