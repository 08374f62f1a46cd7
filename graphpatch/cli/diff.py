"""`graphpatch diff`: what differs between two models: what a library upgrade renamed, what a config changed."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

from ..tree.diff import diff
from ..tree.tree import Tree
from .model import KINDS, open_tree
from .terminal import BOLD, GREEN, RED, YELLOW, paint

FORMAT = 1
"""The version of the JSON form."""
_CONFIG_SHOWN = 20
_PAINT = {"-": RED, "+": GREEN, "~": YELLOW, ">": YELLOW}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("old", metavar="OLD", help=f"a .tree file, or any model; {KINDS}")
    parser.add_argument("new", metavar="NEW", help="likewise")
    parser.add_argument("--json", action="store_true", help="the differences as JSON")


def run(options: argparse.Namespace) -> int:
    old, new = open_tree(options.old), open_tree(options.new)
    found, config = diff(old, new), dict(_config(old, new))
    if options.json:
        print(json.dumps({"format": FORMAT, **found.to_json(), "config": config}, indent=1))
    elif found or config:
        for line in str(found).splitlines() if found else ():
            print(paint(line, _PAINT.get(line[0], "")))
        for key, (was, now) in list(config.items())[:_CONFIG_SHOWN]:
            print(paint(f"~ config.{key}   {_short(was)} -> {_short(now)}", YELLOW))
        if len(config) > _CONFIG_SHOWN:
            print(f"  and {len(config) - _CONFIG_SHOWN} more keys of the config")
        print(paint(f"{found.differing} of {found.size} modules differ", BOLD))
    else:
        print(f"no difference: {new.title or 'two trees'}, {len(new)} modules")
    return int(bool(found or config))


def _config(old: Tree, new: Tree) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """What differs between the roots' configs, but for the version that wrote them."""
    before, after = (tree.config_of(0) or {} for tree in (old, new))
    for key in {**before, **after}:
        pair = before.get(key, "absent"), after.get(key, "absent")
        if pair[0] != pair[1] and key != "transformers_version":
            yield key, pair


def _short(value: Any) -> str:
    text = value if value == "absent" else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
