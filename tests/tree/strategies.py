"""Random trees, and selectors that have a chance to hit something in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

from graphpatch.tree.tree import Mark, Signature, Tensor, Tree, index_of

CLASSES = [
    ("torch.nn.modules.linear.Linear", "torch.nn.modules.module.Module"),
    ("my.norms.FastNorm", "my.norms.Norm", "torch.nn.modules.module.Module"),
    ("my.other.Norm", "torch.nn.modules.module.Module"),
    ("my.Block", "torch.nn.modules.module.Module"),
]
WORDS = ["a", "b", "ab", "a_proj", "b_proj", "layers", "to q", 'x"y', "*"]
NUMBERS = ["0", "1", "2", "3", "10", "11"]
NAMES = WORDS + NUMBERS


def grow(spec: dict[str, Any], edges: Sequence[tuple[int, int, str]] = (), ties: Sequence[Any] = ()) -> Tree:
    """A tree from nested dicts: `{"cls": mro, "params": {..}, "children": {name: spec}}`, all optional."""
    tree = Tree([], [], [], [], [], [], [], source="test")
    known: dict[Any, int] = {}

    def add(name: str, parent: int, length: int, spec: dict[str, Any]) -> None:
        node, children = len(tree.names), spec.get("children", {})
        signature = Signature(
            tuple(spec.get("cls", CLASSES[-1])),
            spec.get("attributes", {}),
            spec.get("params", {}),
            spec.get("buffers", {}),
            spec.get("config", -1),
            frozenset(spec.get("notes", ())),
        )
        key = repr(signature)
        if key not in known:
            known[key] = len(known)
            tree.signatures.append(signature)
        tree.names.append(name)
        tree.parents.append(parent)
        tree.indices.append(index_of(name))
        tree.lengths.append(length if index_of(name) >= 0 else 0)
        tree.signature_of.append(known[key])
        tree.ends.append(0)
        edged = [n for _, p, n in edges if p == node]
        highest = 1 + max([index_of(n) for n in [*children, *edged]], default=-1)
        for child, below in children.items():
            add(child, node, highest, below)
        tree.ends[node] = len(tree.names)

    add("", -1, 0, spec)
    tree.edges = sorted(edges, key=lambda e: e[1])
    tree.ties = list(ties)
    return tree


TENSORS = st.builds(
    Tensor,
    st.lists(st.integers(0, 9), max_size=2).map(tuple),
    st.sampled_from(["float32", "bfloat16"]),
    st.booleans(),
    st.just(False),  # no tensor of a tree is one that an op adds
)
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(0, 3),
    st.floats(allow_nan=False),
    st.text(max_size=4),
    st.lists(st.integers(0, 2), max_size=2).map(tuple),
)


@st.composite
def specs(draw: st.DrawFn, depth: int = 3) -> dict[str, Any]:
    """Nested dicts for `grow`."""
    spec: dict[str, Any] = {
        "cls": draw(st.sampled_from(CLASSES)),
        "params": draw(st.dictionaries(st.sampled_from(["weight", "bias", "0", "1"]), TENSORS, max_size=2)),
        "children": {},
    }
    for key, values in (
        ("attributes", st.dictionaries(st.sampled_from(["layer_idx", "n", "odd name"]), VALUES, max_size=2)),
        ("buffers", st.dictionaries(st.just("table"), TENSORS, max_size=1)),
        ("notes", st.lists(st.sampled_from(["forward", "hf_hook"]), max_size=1)),
    ):
        if draw(st.integers(0, 3)) == 0:
            spec[key] = draw(values)
    if depth and draw(st.integers(0, 3)) == 0:
        # A stack of equal blocks, as models have them.
        block = draw(specs(depth - 1))
        spec["children"] = {str(at): block for at in range(draw(st.integers(1, 4)))}
    elif depth:
        names = draw(st.lists(st.sampled_from(NAMES), max_size=3, unique=True))
        spec["children"] = {name: draw(specs(depth - 1)) for name in names}
    return spec


@st.composite
def trees(draw: st.DrawFn, tied: bool = True) -> Tree:
    spec = draw(specs())
    plain = grow(spec)
    edges: list[tuple[int, int, str]] = []
    ties = []
    if tied and len(plain) > 1:
        for _ in range(draw(st.integers(0, 3))):
            node, parent = draw(st.integers(1, len(plain) - 1)), draw(st.integers(0, len(plain) - 1))
            name = draw(st.sampled_from(NAMES))
            taken = {plain.names[c] for c in plain.children(parent)} | {n for _, p, n in edges if p == parent}
            # A torch module visited later is never an alias of one visited before, so an edge comes after its node.
            if name not in taken | set(plain.signature(parent).parameters) and node <= parent:
                edges.append((node, parent, name))
        owners = [(n, p) for n in range(len(plain)) for p in plain.signature(n).parameters]
        if len(owners) > 1 and draw(st.booleans()):
            first, alias = sorted(
                draw(st.lists(st.sampled_from(range(len(owners))), min_size=2, max_size=2, unique=True))
            )
            ties.append((owners[alias], owners[first]))
    tree = grow(spec, edges, ties)
    if draw(st.booleans()):
        tree.marks = {
            draw(st.integers(0, len(tree) - 1)): (Mark("p", "a.rules:1", "lora(rank=1)", frozenset({"lora"})),)
        }
    return tree


def _steps() -> st.SearchStrategy[str]:
    bounds = st.one_of(st.just(""), st.integers(-4, 4).map(str))
    spans = st.one_of(
        st.just("*"),
        st.integers(-3, 11).map(str),
        st.builds("{}:{}".format, bounds, bounds),
        st.builds("{}:{}:{}".format, bounds, bounds, st.sampled_from(["1", "2", "-1", "-2"])),
    )
    index = st.lists(spans, min_size=1, max_size=2).map(lambda s: f"[{','.join(s)}]")
    names = ["*", "**", "a*", "?", "*_proj", "{a,b}_proj", "{a,*b}", "{0,1}", "{*,a}"]
    plain = st.sampled_from([*WORDS[:6], *NUMBERS, *names, '"to q"', "weight", "bias"])
    return st.builds(str.__add__, plain, st.one_of(st.just(""), index))


def selectors() -> st.SearchStrategy[str]:
    """One branch, as text."""
    path = st.lists(_steps(), min_size=1, max_size=4).map(".".join)
    classes = st.sampled_from(
        ["", "", "", ":Linear", ":Norm", ":=Norm", ":*Norm", ":{Linear,Norm}", ":torch.nn.Linear", ":my.Norm",
         ":my.other.Norm", ":Parameter", ":={Linear,FastNorm}", ":torch.*.Linear"]
    )  # fmt: skip
    return st.builds(
        lambda anchor, path, cls: f"{anchor}{path}{cls}" or "^",
        st.sampled_from(["", "^"]),
        st.one_of(path, path, path, st.just("")),
        classes,
    )
