"""`graphpatch explain`: which rules touch a module or parameter, and where each other one stopped matching."""

from __future__ import annotations

import argparse

from ..plan.explain import explain
from .model import add_model, open_tree
from .rule_files import FILE_HELP, add_settings, open_rules


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="of a module or parameter: model.layers.3.mlp.up_proj")
    parser.add_argument("file", metavar="FILE", help=FILE_HELP)
    add_model(parser)
    add_settings(parser)


def run(options: argparse.Namespace) -> int:
    rules = open_rules(options.file, options.settings)
    print(explain(open_tree(options.model), rules, options.path))
    return 0
