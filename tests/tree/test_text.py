"""The `.tree` form: short, exact, and clear about what is wrong with a file."""

from __future__ import annotations

import time

import pytest

from graphpatch.lang.diagnostics import Error
from graphpatch.tree.tree import Tensor, Tree

from .strategies import CLASSES, grow

LINEAR, NORM = CLASSES[0], CLASSES[1]


def layer(at: int, names=("q_proj", "k_proj")) -> dict:
    linear = {"cls": LINEAR, "params": {"weight": Tensor((4, 4), "float32")}}
    return {"attributes": {"layer_idx": at, "heads": 8}, "children": dict.fromkeys(names, linear)}


def llama(layers: int = 32) -> Tree:
    stack = {str(at): layer(at) for at in range(layers)}
    weight = {"weight": Tensor((9, 4), "float32", False)}
    model = {"children": {"embed": {"params": weight}, "layers": {"children": stack}}}
    tree = grow({"children": {"model": model, "lm_head": {"params": weight}}})
    tree.ties = [((tree.find("lm_head"), "weight"), (tree.find("model.embed"), "weight"))]
    tree.configs, tree.wrappers = [{"hidden_size": 4, "odd key": [1, {"a": None}]}], ["DistributedDataParallel"]
    return tree


def test_equal_layers_stand_in_one_line():
    text = llama().to_text()
    assert text.startswith("graphpatch tree 1\n")
    lines = [line.strip() for line in text.splitlines()]
    assert "[0:32]: Block layer_idx=@ heads=8" in lines
    assert "q_proj: Linear; param weight float32[4,4]" in lines
    assert "weight = ^model.embed.weight" in lines
    assert "embed: Block; param weight float32[9,4] frozen" in lines
    assert len(lines) < 30
    again = Tree.from_text(text)
    assert again.configs == [{"hidden_size": 4, "odd key": [1, {"a": None}]}]
    assert again.wrappers == ["DistributedDataParallel"]
    assert again.signature(again.find("model.layers.7")).attributes == {"layer_idx": 7, "heads": 8}


def test_layers_that_differ_stand_apart():
    stack = {str(at): layer(at, ("q_proj",) if at % 2 else ("q_proj", "k_proj")) for at in range(8)}
    tree = grow({"children": {"layers": {"children": stack}}})
    keys = [line.split(":")[0].strip() for line in tree.to_text().splitlines() if line.strip().startswith("[")]
    assert keys == ["[0,2,4,6]", "[1,3,5,7]"] or "[0:7:2]" in tree.to_text()
    assert Tree.from_text(tree.to_text()).names == tree.names


def test_a_value_that_merely_equals_an_index_stays_a_value():
    stack = {str(at): {"attributes": {"heads": 1}} for at in range(3)}
    tree = grow({"children": {"layers": {"children": stack}}})
    assert "[0:3]: Block heads=1" in tree.to_text()


def test_numbered_names_out_of_order_keep_it():
    tree = grow({"children": {name: {} for name in ["3", "1", "2", "x", "0"]}})
    assert Tree.from_text(tree.to_text()).names == ["", "3", "1", "2", "x", "0"]


def test_a_container_longer_than_its_children_keeps_its_length():
    tree = grow({"children": {"layers": {"children": {"4": {}, "5": {}}}}})
    tree.lengths = [8 if index >= 0 else 0 for index in tree.indices]
    again = Tree.from_text(tree.to_text())
    assert again.lengths == tree.lengths and "length 8" in tree.to_text()


def test_ties_within_a_layer_are_said_from_there():
    block = {"children": {"a": {}, "b": {"children": {"c": {"params": {"w": Tensor((1,), "float32")}}}}}}
    tree = grow({"children": {"layers": {"children": {str(at): block for at in range(3)}}}})
    tree.edges = [(tree.find(f"layers.{at}.a"), tree.find(f"layers.{at}.b"), "again") for at in range(3)]
    text = tree.to_text()
    assert "again -> ..a" in text and "[0:3]" in text
    assert Tree.from_text(text).edges == tree.edges


def test_a_file_on_disk(tmp_path):
    tree, path = llama(), tmp_path / "a b.tree"
    tree.write(str(path))
    assert Tree.read(str(path)).fingerprint == tree.fingerprint
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert Tree.read(str(path)).fingerprint == tree.fingerprint
    for broken, code in [(b"", "GP431"), (b"\xff\xfe\x00", "GP431"), (b"patch x with lora", "GP431")]:
        path.write_bytes(broken)
        with pytest.raises(Error) as error:
            Tree.read(str(path))
        assert error.value.code == code and "a b.tree" in str(error.value)
    for bad in (str(tmp_path), str(tmp_path / "none.tree")):
        with pytest.raises(Error) as error:
            Tree.read(bad)
        assert error.value.code == "GP430" and bad in str(error.value)
    with pytest.raises(Error) as error:
        tree.write(str(tmp_path / "no" / "where.tree"))
    assert error.value.code == "GP430"


HEAD = "graphpatch tree 1\n\nclasses\n  A = m.A\n\nmodules\n"


@pytest.mark.parametrize(
    "body, code, line",
    [
        ("  ^: A\n    a: A\n", "GP435", 8),
        ("  ^: A\nend 2 modules\n", "GP435", 9),
        ("  ^: A\n    a: B\nend 2 modules\n", "GP433", 8),
        ("  ^: A\n      a: A\nend 2 modules\n", "GP433", 8),
        ("  ^: A\n   a: A\nend 2 modules\n", "GP433", 8),
        ("  ^: A\n    [0:999999999]: A\nend 2 modules\n", "GP434", 8),
        ("  ^: A\n    [0:2000]: A\n      [0:2000]: A\n        [0:2000]: A\nend 2 modules\n", "GP434", 9),
        ("  ^: A\n    [9999999999]: A\nend 2 modules\n", "GP433", 8),
        ("  ^: A\n    [3:1]: A\nend 1 modules\n", "GP433", 8),
        ("  ^: A\n    [0:4:0]: A\nend 1 modules\n", "GP433", 8),
        ("  ^: A\n    [0:2]: A\n    [1]: A\nend 4 modules\n", "GP433", 7),
        ("  ^: A\n    a: A\n    a: A\nend 3 modules\n", "GP433", 7),
        ("  ^: A\n    a: A x=\nend 2 modules\n", "GP433", 8),
        ("  ^: A\n    a: A x={}\nend 2 modules\n", "GP433", 8),
        ("  ^: A\n    a: A x=1 x=2\nend 2 modules\n", "GP433", 8),
        ("  ^: A\n    a: A x=@\nend 2 modules\n", "GP433", 8),
        ("  ^: A\n    a: A; param w float32[1,-2]\nend 2 modules\n", "GP433", 8),
        ("  ^: A\n    a: A; config 0\nend 2 modules\n", "GP433", 8),
        ("  ^: A\n    a: A\n      w = ^b.w\nend 2 modules\n", "GP433", 9),
        ("  ^: A\n    a -> ^b\nend 1 modules\n", "GP433", 8),
        ("  ^: A\n    a -> ....b\nend 1 modules\n", "GP433", 8),
        ("  ^: A\n  ^: A\nend 1 modules\n", "GP433", 8),
        ("  a: A\nend 1 modules\n", "GP433", 7),
        ("end 0 modules\n", "GP433", 1),
        ("  ^: A\nend 1 modules\n  more\n", "GP433", 9),
        ("  ^: A\nsurprise\nend 1 modules\n", "GP433", 8),
        ("  ^: A x=" + "[" * 100_000 + "\nend 1 modules\n", "GP433", 7),
        ("  ^: A x=" + "9" * 10_000 + "\nend 1 modules\n", "GP433", 7),
        ("  ^: A\nconfig 0\n  a = [1,\nend 1 modules\n", "GP433", 9),
        ("  ^: A\nmarks\n  [1] ^\nend 1 modules\n", "GP433", 9),
        ("  ^: A\nmarks\n  [] @x\nend 1 modules\n", "GP433", 9),
    ],
)
def test_a_wrong_line_is_named(body, code, line):
    started = time.monotonic()
    with pytest.raises(Error) as error:
        Tree.from_text(HEAD + body, "x.tree")
    assert error.value.code == code
    assert error.value.diagnostics[0].places[0].span.line == line
    assert f"x.tree:{line}:" in str(error.value)
    # No hang: a refusal comes before anything is unfolded.
    assert time.monotonic() - started < 5


def test_another_version_is_told_apart_from_another_file():
    with pytest.raises(Error) as error:
        Tree.from_text("graphpatch tree 2\n")
    assert error.value.code == "GP432"


def test_every_cut_of_a_file_is_noticed():
    text = llama(4).to_text()
    for at in range(0, len(text) - 2, 7):
        with pytest.raises(Error):
            Tree.from_text(text[:at])
