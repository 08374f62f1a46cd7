"""What the tree costs, in walks: one walk is `list(model.named_modules())` on the same model, in the same run.

    python -m benchmarks.matching [LAYERS]

A spike (tree as flat arrays, one automaton) had: snapshot 2.6; 1, 10, 100 and 1000 rules 0.2, 0.3, 0.5 and 2.
"""

from __future__ import annotations

import sys
from typing import Any, NoReturn

from graphpatch.lang.diagnostics import Span
from graphpatch.lang.parser import parse_selector
from graphpatch.lang.syntax import SelectorUnion
from graphpatch.tree.compress import compress
from graphpatch.tree.select import Compiled, compile_selector, match
from graphpatch.tree.stacks import stacks
from graphpatch.tree.tree import Tree

from .deepseek import LAYERS, build
from .table import least, row


class NoRoles:
    """Selectors of plain names and numbers need nothing of where they stand."""

    def alias(self, name: str, span: Span | None) -> NoReturn:
        raise AssertionError(name)

    def integer(self, bound: Any) -> int:
        return int(bound.value)

    def fail(self, code: str, title: str, span: Span | None = None, label: str = "", fixes: Any = ()) -> NoReturn:
        raise AssertionError(title)


def compiled(text: str) -> Compiled:
    union: SelectorUnion = parse_selector(text)
    return compile_selector(union, NoRoles())


def rules(count: int) -> list[Compiled]:
    """Rules with indices, slices, braces and gaps, no two alike."""
    texts = [
        f"layers[{at % 50}:].self_attn.{{q,o}}_{'b_' if at % 4 else ''}proj"
        if at % 2
        else f"layers[{at % 61}].mlp.experts[{at // 61}:].{{gate,up,down}}_proj"
        for at in range(count)
    ]
    return [compiled(text) for text in texts]


def main() -> None:
    model = build(int(sys.argv[1]) if len(sys.argv) > 1 else LAYERS)
    walk = least(lambda: list(model.named_modules()))
    tree = Tree.of(model)
    row(f"modules ({len(tree.signatures)} signatures)", len(tree), "")
    row("one walk: list(model.named_modules())", walk)
    row("snapshot", least(lambda: Tree.of(model)) / walk, "walks", "<= 2.6")

    def fresh(name: str) -> object:
        tree.__dict__.pop(name, None)
        return getattr(tree, name)

    for name in ("paths", "kinds", "shapes", "fingerprint"):
        row(f"{name}, once a tree", least(lambda name=name: fresh(name)) / walk, "walks")
    one = 0.0
    for count in (1, 10, 100, 1000):
        selectors = rules(count)
        cost = least(lambda selectors=selectors: match(tree, selectors), repeats=3)
        one = one or cost
        row(f"match {count} rules", cost / walk, "walks", f"{cost / one:.1f} x one rule")
    linears = compiled("layers[i in *].**:Linear")
    (hits,) = match(tree, [linears])
    row(f"match layers[*].**:Linear, {len(hits)} hits", least(lambda: match(tree, [linears])) / walk, "walks")
    row("  compress them", least(lambda: compress(tree, hits.nodes)) / walk, "walks")
    row("  in which stacks they are", least(lambda: stacks(tree, linears, hits.nodes)) / walk, "walks")
    row("  bindings of each", least(lambda: [hits.bindings(node) for node in hits.nodes]) / walk, "walks")
    text = tree.to_text()
    row(f"text form, {text.count(chr(10))} lines: write", least(tree.to_text, repeats=2) / walk, "walks")
    row("  read", least(lambda: Tree.from_text(text), repeats=2) / walk, "walks")


if __name__ == "__main__":
    main()
