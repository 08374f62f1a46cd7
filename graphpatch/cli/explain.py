"""`graphpatch explain`: which rules touch a module or parameter, and where each other one stopped matching."""

from __future__ import annotations

import argparse
import json

from ..plan.explain import explain
from .model import add_model, open_tree
from .rule_files import FILE_HELP, add_settings, open_rules

FORMAT = 1
"""The version of the JSON form."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="of a module or parameter: model.layers.3.mlp.up_proj")
    parser.add_argument("file", metavar="FILE", help=FILE_HELP)
    add_model(parser)
    add_settings(parser)
    parser.add_argument("--json", action="store_true", help="the verdicts as JSON")


def run(options: argparse.Namespace) -> int:
    rules = open_rules(options.file, options.settings)
    said = explain(open_tree(options.model), rules, options.path)
    print(json.dumps({"format": FORMAT, **said.to_json()}, indent=1) if options.json else said)
    return 0
