"""The fast ways against the slow ones, on random trees."""

from __future__ import annotations

import os
from dataclasses import fields

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graphpatch.lang.diagnostics import Error
from graphpatch.lang.parser import parse_selector
from graphpatch.tree.compress import compress
from graphpatch.tree.select import Cover, match
from graphpatch.tree.tree import Tree

from .naive import matches, routes
from .scopes import compiled
from .strategies import selectors, trees

EXAMPLES = int(os.environ.get("GRAPHPATCH_EXAMPLES", "60"))
quick = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@quick
@given(trees(), st.lists(selectors(), min_size=1, max_size=4))
def test_one_pass_for_many_selectors_finds_what_the_naive_matcher_finds(tree, texts):
    for text, hits in zip(texts, match(tree, [compiled(text) for text in texts])):
        nodes, parameters = matches(tree, parse_selector(text).branches[0])
        assert (set(hits.nodes), set(hits.parameters)) == (nodes, parameters), text
        assert hits.nodes == sorted(hits.nodes)
        assert len(set(hits.parameters)) == len(hits.parameters)


@quick
@given(trees(), selectors())
def test_an_alternative_is_in_exactly_the_hits_of_the_selector_narrowed_to_it(tree, text):
    union = compiled(text)
    (hits,) = match(tree, [union])
    for at, alternative in enumerate(union.alternatives):
        option = alternative.text.strip("{}").removeprefix(":")
        if text.count("{") != 1 or text.count(option) != 1:
            continue
        start, end = text.index("{"), text.index("}")
        narrowed = text[:start] + option + text[end + 1 :]
        nodes, parameters = matches(tree, parse_selector(narrowed).branches[0])
        assert {n for n in hits.nodes if hits.alternatives(n) >> at & 1} == nodes
        assert {p for p in hits.parameters if hits.alternatives(p) >> at & 1} == parameters


@quick
@given(trees(), st.data())
def test_compressed_paths_select_exactly_what_they_came_from(tree, data):
    nodes = data.draw(st.sets(st.integers(0, len(tree) - 1)))
    owners = [(n, p) for n in range(len(tree)) for p in tree.signature(n).parameters if (n, p) not in tree.first_of]
    parameters = data.draw(st.sets(st.sampled_from(owners))) if owners else set()
    texts = compress(tree, nodes, parameters)
    found = match(tree, [compiled(text) for text in texts])
    assert {n for hits in found for n in hits.nodes} == nodes
    assert {p for hits in found for p in hits.parameters} == parameters
    # Nothing is said twice.
    assert sum(len(hits) for hits in found) == len(nodes) + len(parameters)


def same(one: Tree, other: Tree) -> bool:
    ours = [f.name for f in fields(Tree) if f.name != "modules"]
    return all(repr(getattr(one, name)) == repr(getattr(other, name)) for name in ours)


@quick
@given(trees())
def test_a_tree_reads_back_from_its_text_exactly(tree):
    text = tree.to_text()
    again = Tree.from_text(text)
    assert same(tree, again)
    assert again.fingerprint == tree.fingerprint
    assert again.to_text() == text


@quick
@given(trees())
def test_all_paths_are_those_of_the_naive_walk(tree):
    for node, segments in routes(tree).items():
        paths = tree.all_paths(node)
        assert sorted(paths) == sorted(".".join(name for name, _ in path) for path in segments)
        assert paths[0] == tree.paths[node]
        assert all(tree.find(path) == node for path in paths)


@quick
@given(trees(), st.data())
def test_a_cover_is_everything_below_by_any_path(tree, data):
    nodes = data.draw(st.sets(st.integers(0, len(tree) - 1), max_size=3))
    tops = [path for node in nodes for path in tree.all_paths(node)]
    cover = Cover(tree, nodes)
    for node in range(len(tree)):
        below = any(p == top or not top or p.startswith(top + ".") for p in tree.all_paths(node) for top in tops)
        assert (node in cover) == below
    assert all(a[1] < b[0] for a, b in zip(cover.intervals, cover.intervals[1:]))


@quick
@given(trees(tied=False), st.data())
def test_a_damaged_tree_file_is_refused_or_read_but_never_breaks(tree, data):
    text = tree.to_text()
    at = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(at, min(len(text), at + 9)))
    patch = data.draw(st.sampled_from(["", "]", "[0:999999999]", '"', "@", "\n", "  ", "9", "{", "= ", "\x00", "é"]))
    try:
        again = Tree.from_text(text[:at] + patch + text[end:])
        assert len(again) >= 1
    except Error as error:
        assert error.code in {f"GP43{n}" for n in range(1, 6)}
        assert error.diagnostics[0].places[0].span.line >= 1
        str(error)
