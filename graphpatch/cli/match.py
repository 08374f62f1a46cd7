"""`graphpatch match`: what a selector matches, in compressed paths; where it matches nothing, the nearest miss."""

from __future__ import annotations

import argparse
import json

from ..lang.diagnostics import Diagnostic, Place, Source, Span
from ..plan.report import amount
from ..plan.select import matches
from ..tree.compress import compress
from ..tree.nearmiss import near_miss
from ..tree.select import Compiled, Hits
from ..tree.tree import Parameter, Tree
from .model import add_model, open_tree
from .terminal import BOLD, color_on, paint

FORMAT = 1
"""The version of the JSON form."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("selector", metavar="SELECTOR", help="in quotes: 'layers[:4].**.q_proj', '@qkv', ':*Norm'")
    add_model(parser)
    parser.add_argument("-v", "--verbose", action="store_true", help="list every path")
    parser.add_argument("--json", action="store_true", help="every path, as JSON")


def run(options: argparse.Namespace) -> int:
    tree = open_tree(options.model)
    compiled, hits = matches(tree, options.selector)
    dead = list(_dead(tree, options.selector, compiled, hits))
    if options.json:
        print(json.dumps(_json(tree, options.selector, hits, dead), indent=1))
    else:
        _print(tree, hits, dead, options.verbose)
    return 0 if hits.nodes or hits.parameters else 1


def _print(tree: Tree, hits: Hits, dead: list[Diagnostic], verbose: bool) -> None:
    if hits.nodes or hits.parameters:
        counts = [_many(len(hits.nodes), "module")] * bool(hits.nodes)
        counts += [_many(len(hits.parameters), "parameter")] * bool(hits.parameters)
        elements = tree.numel({n for start in hits.nodes for n in range(start, tree.ends[start])})
        elements += sum(tree.signature(n).parameters[name].numel for n, name in hits.parameters)
        print(paint(f"{' and '.join(counts)}, {amount(elements)} parameters in them", BOLD))
        for path in _all_paths(tree, hits) if verbose else compress(tree, hits.nodes, hits.parameters):
            print(f"  {path}")
    for diagnostic in dead:
        print(diagnostic.render(color_on()))


def _all_paths(tree: Tree, hits: Hits) -> list[str]:
    paths = [(node, "^" + tree.paths[node]) for node in hits.nodes]
    paths += [(node, "^" + tree.parameter_paths((node, name))[0]) for node, name in hits.parameters]
    return [path for _, path in sorted(paths)]


def _json(tree: Tree, selector: str, hits: Hits, dead: list[Diagnostic]) -> dict[str, object]:
    return {
        "format": FORMAT,
        "selector": selector,
        "compressed": compress(tree, hits.nodes, hits.parameters),
        "modules": [tree.all_paths(node) for node in hits.nodes],
        "parameters": [tree.parameter_paths(p) for p in hits.parameters],
        "findings": [d.to_json() for d in dead],
    }


def _dead(tree: Tree, text: str, compiled: Compiled, hits: Hits) -> list[Diagnostic]:
    """Why nothing matches; else each alternative that no hit took part in."""
    source = Source("<selector>", text)
    whole = Span(1, 1, 1, len(text) + 1)
    if not hits.nodes and not hits.parameters:
        miss = near_miss(tree, compiled, None)
        place = Place(source, miss.span or compiled.union.span or whole, miss.text)
        return [Diagnostic("GP401", "the selector matches nothing", (place,))]
    seen = 0
    everywhere: list[int | Parameter] = [*hits.nodes, *hits.parameters] if compiled.alternatives else []
    for hit in everywhere:
        seen |= hits.alternatives(hit)
    findings = []
    for at, alternative in enumerate(compiled.alternatives):
        if not seen >> at & 1:
            miss = near_miss(tree, compiled, at)
            place = Place(source, alternative.span or miss.span or whole, miss.text)
            findings.append(Diagnostic("GP402", f"`{alternative.text}` matches nothing", (place,), severity="warning"))
    return findings


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"
