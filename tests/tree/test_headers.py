"""Trees from safetensors headers, good and hostile."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from graphpatch.lang.diagnostics import Error
from graphpatch.tree.compress import compress
from graphpatch.tree.headers import read_headers
from graphpatch.tree.tree import Tensor

from .scopes import hits, paths


def test_names_shapes_and_dtypes_are_those_of_the_file(tmp_path):
    tensors = {
        f"model.layers.{at}.{name}.weight": torch.zeros(2, 3, dtype=torch.bfloat16)
        for at in (10, 2, 0, 1)
        for name in ("q", "k")
    }
    tensors |= {"lm_head.weight": torch.zeros(4), "scale": torch.zeros(())}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    tree = read_headers(str(tmp_path / "model.safetensors"))
    assert not tree.has_classes and tree.title == ""
    assert set(paths(tree, "**:Parameter")) == set(tensors)
    assert tree.signature(tree.find("model.layers.2.q")).parameters == {"weight": Tensor((2, 3), "bfloat16")}
    assert [tree.indices[n] for n in tree.children(tree.find("model.layers"))] == [0, 1, 2, 10]
    assert tree.lengths[tree.find("model.layers.1")] == 11
    assert paths(tree, "layers[1].q") == ["model.layers.1.q"]
    assert tree.numel() == sum(t.numel() for t in tensors.values())


def test_a_directory_of_shards_is_one_tree(tmp_path):
    save_file({"a.0.w": torch.zeros(1)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"a.1.w": torch.zeros(1)}, tmp_path / "model-00002-of-00002.safetensors")
    assert read_headers(str(tmp_path)).paths == ["", "a", "a.0", "a.1"]
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a.0.w": "model-00001-of-00002.safetensors"}}))
    assert read_headers(str(tmp_path)).paths == ["", "a", "a.0"]
    assert read_headers(str(index)).paths == ["", "a", "a.0"]
    for wrong, code in [
        ({"weight_map": {"a": "../model.safetensors"}}, "GP436"),
        ({"weight_map": {"a": "missing.safetensors"}}, "GP430"),
        ({"weight_map": ["a"]}, "GP436"),
        ([], "GP436"),
    ]:
        index.write_text(json.dumps(wrong))
        with pytest.raises(Error) as error:
            read_headers(str(tmp_path))
        assert error.value.code == code


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    for number in (1, 2):
        save_file({"a.w": torch.zeros(1)}, tmp_path / f"{number}.safetensors")
    with pytest.raises(Error, match="so does a file before it"):
        read_headers(str(tmp_path))


def test_a_class_is_an_error_where_there_are_none(tmp_path):
    save_file({"a.w": torch.zeros(1)}, tmp_path / "m.safetensors")
    tree = read_headers(str(tmp_path))
    for text in ("a:Linear", ":Linear", "/a/:Linear"):
        with pytest.raises(Error) as error:
            hits(tree, text)
        assert error.value.code == "GP422"
    assert hits(tree, "a.w:Parameter").parameters == [(1, "w")]


def test_a_module_and_a_parameter_of_one_name(tmp_path):
    # bitsandbytes writes `q.weight` and, for its state, `q.weight.absmax`.
    save_file({"q.weight": torch.zeros(1), "q.weight.absmax": torch.zeros(1)}, tmp_path / "m.safetensors")
    tree = read_headers(str(tmp_path))
    module, parameter = tree.find("q.weight"), (tree.find("q"), "weight")
    found = hits(tree, "q.weight")
    assert (found.nodes, found.parameters) == ([module], [parameter])
    for nodes, parameters in [([module], []), ([], [parameter]), ([module], [parameter])]:
        again = [hits(tree, text) for text in compress(tree, nodes, parameters)]
        assert [n for h in again for n in h.nodes] == nodes
        assert [p for h in again for p in h.parameters] == parameters


def header(data: object, length: int | None = None) -> bytes:
    text = data if isinstance(data, bytes) else json.dumps(data).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234567",
        header({}, length=1 << 62),
        header({}, length=3000),
        header(b"not json"),
        header(b"[" * 100_000),
        header([1]),
        header({"a": 3}),
        header({"a": {"dtype": "F32"}}),
        header({"a": {"dtype": "F32", "shape": [1, -1]}}),
        header({"a": {"dtype": "F32", "shape": [True]}}),
        header({"a": {"dtype": "F32", "shape": [1 << 70]}}),
        header({"a": {"dtype": 3, "shape": [1]}}),
        header({".".join("a" * 1000): {"dtype": "F32", "shape": [1]}}),
        header({}),
        header(b"\xff\xfe"),
    ],
)
def test_a_hostile_file_is_one_clear_error(tmp_path, content):
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    with pytest.raises(Error) as error:
        read_headers(str(path))
    assert error.value.code == "GP436" and "m.safetensors" in str(error.value)


def test_what_is_missing_is_named(tmp_path):
    for path in (tmp_path, tmp_path / "none.safetensors"):
        with pytest.raises(Error) as error:
            read_headers(str(path))
        assert error.value.code == "GP430" and str(path) in str(error.value)
