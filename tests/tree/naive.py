"""The oracle: what a selector matches, by trying everything. Slow, short, and written from design.md alone."""

from __future__ import annotations

from fnmatch import fnmatchcase
from itertools import product

from graphpatch.lang.syntax import PathSelector, Selector
from graphpatch.tree.tree import Tree, index_of

Segments = tuple[tuple[str, int], ...]
"""(name, length of the container) for each segment of a path."""


def routes(tree: Tree) -> dict[int, list[Segments]]:
    """Every path of every node that goes through no module twice."""
    below: dict[int, list[tuple[str, int]]] = {n: [] for n in range(len(tree))}
    for node in range(1, len(tree)):
        below[tree.parents[node]].append((tree.names[node], node))
    for node, parent, name in tree.edges:
        below[parent].append((name, node))
    found: dict[int, list[Segments]] = {n: [] for n in range(len(tree))}

    def go(node: int, path: Segments, on: frozenset[int]) -> None:
        found[node].append(path)
        length = 1 + max((index_of(name) for name, _ in below[node]), default=-1)
        for name, child in below[node]:
            if child not in on:
                go(child, (*path, (name, length)), on | {child})

    go(0, (), frozenset({0}))
    return found


def braces(text: str) -> list[str]:
    head, brace, rest = text.partition("{")
    if not brace:
        return [text]
    inside, _, tail = rest.partition("}")
    return [head + one.strip() + more for one, more in product(inside.split(","), braces(tail))]


def names_match(step, name: str) -> bool:
    if step.kind == "quoted":
        return step.name == name
    for glob in braces(step.name):
        wild = "*" in glob or "?" in glob
        if glob == "*" or (not wild and glob == name):
            return True
        if wild and set(glob) != {"*"} and index_of(name) < 0 and fnmatchcase(name, glob.replace("[", "[[]")):
            return True
    return False


def number(bound) -> int | None:
    if bound is None:
        return None
    return bound.value if bound.kind == "literal" else {"-": -1, "+": 1}[bound.op] * bound.operand.value


def index_matches(index, name: str, length: int) -> bool:
    at = index_of(name)
    if at < 0:
        return False
    numbers = list(range(length))
    chosen: set[int] = set()
    for span in index.spans:
        if span.kind == "every":
            chosen.update(numbers)
        elif span.kind == "range":
            chosen.update(numbers[number(span.start) : number(span.stop) : number(span.step)])
        elif -length <= number(span.at) < length:
            chosen.add(numbers[number(span.at)])
    return at in chosen


def path_matches(tests: list, path: Segments) -> bool:
    if not tests:
        return not path
    kind, what = tests[0]
    if kind == "any":
        return path_matches(tests[1:], path) or (bool(path) and path_matches(tests, path[1:]))
    if not path:
        return False
    name, length = path[0]
    fits = names_match(what, name) if kind == "name" else index_matches(what, name, length)
    return fits and path_matches(tests[1:], path[1:])


def class_matches(text: str, mro: tuple[str, ...]) -> bool:
    exact, text = text.startswith("="), text.lstrip("=")
    for name in braces(text):
        *package, last = name.split(".")
        for qualified in mro[:1] if exact else mro:
            *own, cls = qualified.split(".")
            above = any(
                len(own[:n]) == len(package) and all(map(fnmatchcase, own[:n], package)) for n in range(len(own) + 1)
            )
            if fnmatchcase(cls, last) and above:
                return True
    return False


def matches(tree: Tree, selector: Selector) -> tuple[set[int], set[tuple[int, str]]]:
    assert isinstance(selector, PathSelector)
    tests: list = [] if selector.anchored else [("any", None)]
    for step in selector.steps:
        tests.append(("any", None) if (step.kind, step.name) == ("glob", "**") else ("name", step))
        if step.index is not None:
            tests.append(("index", step.index))
    asked = selector.cls or ""
    last = selector.steps[-1] if selector.steps else None
    # A final `*` or `**` is about modules; one of several alternatives counts on its own.
    endings = braces(last.name) if last is not None and last.kind == "glob" and last.index is None else [""]
    nodes, parameters = set(), set()
    aliases = dict(tree.ties)
    all_routes = routes(tree)
    for ending in endings:
        if ending:
            tests[-1] = ("any", None) if last.name == "**" else ("name", last.model_copy(update={"name": ending}))
        for node, paths in all_routes.items():
            signature = tree.signature(node)
            if asked != "Parameter" and (not asked or class_matches(asked, signature.mro)):
                if any(path_matches(tests, path) for path in paths):
                    nodes.add(node)
            if asked == "Parameter" or (not asked and last is not None and ending not in ("*", "**")):
                length = 1 + max(map(index_of, signature.parameters), default=-1)
                for name in signature.parameters:
                    if any(path_matches(tests, (*path, (name, length))) for path in paths):
                        parameters.add(aliases.get((node, name), (node, name)))
        if asked == "Parameter":
            nodes = set()
    return nodes, parameters
