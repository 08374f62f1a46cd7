"""`/regex/` selectors: outside the automaton, over the whole path of every module."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

from .compile import Regex
from .cover import Cover
from .hits import Hits
from .tree import Tree


def match_regex(tree: Tree, regex: Regex, added: Mapping[int, Iterable[str]], hits: Hits) -> None:
    fullmatch = regex.regex.fullmatch
    tied = Cover(tree, tree.places) if tree.places else None
    accepted = [not regex.classes or all(t.accepts(s.mro) for t in regex.classes) for s in tree.signatures]
    nodes: list[int] = []
    parameters: dict[str, list[int]] = defaultdict(list)
    for node, path in enumerate(tree.paths):
        paths = tree.all_paths(node) if tied is not None and node in tied else (path,)
        if regex.modules and accepted[tree.signature_of[node]] and any(map(fullmatch, paths)):
            nodes.append(node)
        if regex.parameters:
            for name in (*tree.signature(node).parameters, *added.get(node, ())):
                if any(fullmatch(f"{p}.{name}" if p else name) for p in paths):
                    parameters[name].append(node)
    if nodes:
        hits._node_runs.append((regex.alternatives, nodes))
    hits._parameter_runs += [(regex.alternatives, name, owners) for name, owners in parameters.items()]
