"""`graphpatch tree`: a model as text, to read, to compare, and to plan from where neither torch nor the model is."""

from __future__ import annotations

import argparse
import sys

from .model import add_model, open_tree
from .output import write_text
from .terminal import note


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("-o", "--out", metavar="FILE", help="write to a file, by custom MODEL.tree")


def run(options: argparse.Namespace) -> int:
    tree = open_tree(options.model)
    if options.out:
        write_text(options.out, tree.to_text())
        note(f"{tree.title or 'a tree without classes'}, {len(tree)} modules, saved to {options.out}")
    else:
        sys.stdout.write(tree.to_text())
    return 0
