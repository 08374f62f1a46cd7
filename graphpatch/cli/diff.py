"""`graphpatch diff`: what differs between two models: what a library upgrade renamed, what a config changed."""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from ..tree.compress import compress
from ..tree.tree import Tree
from .difference import Difference, difference, template
from .model import KINDS, open_tree
from .terminal import BOLD, GREEN, RED, YELLOW, paint

_CONFIG_SHOWN = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("old", metavar="TREE", help=f"a .tree file, or any model; {KINDS}")
    parser.add_argument("new", metavar="TREE", help="likewise")


def run(options: argparse.Namespace) -> int:
    found = difference(open_tree(options.old), open_tree(options.new))
    config = list(_config_lines(found.old, found.new))
    if not found and not config:
        print(f"no difference: {found.old.title or 'two trees'}, {len(found.old)} modules")
        return 0
    for line in _lines(found):
        print(line)
    for line in config:
        print(line)
    print(paint(_summary(found), BOLD))
    return 1


def _lines(found: Difference) -> Iterator[str]:
    old, new = found.old, found.new
    by_pattern: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
    for pair in found.renamed:
        by_pattern[template(old.paths[pair.old]), template(new.paths[pair.new])].append(pair)
    for pairs in by_pattern.values():
        was, now = (_paths(t, [p[at] for p in pairs]) for at, t in enumerate((old, new)))
        yield paint(f"> {was} -> {now}", YELLOW)
    for sign, color, tree, nodes in (("-", RED, old, found.gone), ("+", GREEN, new, found.come)):
        by_look: dict[str, list[int]] = defaultdict(list)
        for node in nodes:
            by_look[f"{template(tree.paths[node]).rpartition('.')[0]} {_look(tree, node)}"].append(node)
        for group in by_look.values():
            yield f"{paint(f'{sign} {_paths(tree, group)}', color)}   {_look(tree, group[0])}".rstrip()
    by_change: dict[str, list[int]] = defaultdict(list)
    for pair, text in found.changed:
        by_change[text].append(pair.new)
    for text, nodes in by_change.items():
        yield f"{paint(f'~ {_paths(new, nodes)}', YELLOW)}   {text}"


def _paths(tree: Tree, nodes: list[int]) -> str:
    return " | ".join(compress(tree, sorted(nodes)))


def _look(tree: Tree, node: int) -> str:
    """`Linear(weight [4096, 4096])`, `LlamaMLP (4 modules)`."""
    signature, below = tree.signature(node), tree.ends[node] - node
    shapes = ", ".join(f"{name} {list(t.shape)}" for name, t in signature.parameters.items())
    said = f"{signature.cls}({shapes})" if shapes else signature.cls
    return f"{said} ({below} modules)" if below > 1 else said


def _config_lines(old: Tree, new: Tree) -> Iterator[str]:
    before, after = (tree.config_of(0) or {} for tree in (old, new))
    keys = [k for k in {**before, **after} if before.get(k) != after.get(k) and k != "transformers_version"]
    for key in keys[:_CONFIG_SHOWN]:
        yield paint(f"~ config.{key}   {_short(before, key)} -> {_short(after, key)}", YELLOW)
    if len(keys) > _CONFIG_SHOWN:
        yield f"  and {len(keys) - _CONFIG_SHOWN} more keys of the config"


def _short(config: dict[str, Any], key: str) -> str:
    text = repr(config[key]) if key in config else "absent"
    return text if len(text) <= 60 else text[:57] + "..."


def _summary(found: Difference) -> str:
    counts = {
        "renamed": len(found.renamed),
        "gone": len(found.gone),
        "new": len(found.come),
        "changed": len(found.changed),
    }
    return "Difference: " + ", ".join(f"{n} {what}" for what, n in counts.items() if n) if found else "Difference: the config"
