"""`graphpatch import`: the LoRA of an adapter in PEFT's format, as a rule file."""

from __future__ import annotations

import argparse
import sys

from ..checkpoint.peft.rules import from_peft
from .output import write_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="holds adapter_config.json, and mostly adapter_model.safetensors")
    parser.add_argument("-o", "--output", metavar="FILE", help="write the rules there instead of printing them")


def run(options: argparse.Namespace) -> int:
    text = from_peft(options.folder).program.source(0).text
    if options.output:
        write_text(options.output, text)
        print(f"{options.output} has the rules of {options.folder}")
    else:
        sys.stdout.write(text)
    return 0
