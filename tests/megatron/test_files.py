"""An adapter's own files, of a model over ranks: those that one process would have written, read at any layout."""

from __future__ import annotations

import contextlib
import io
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import graphpatch
from graphpatch.cli.main import main
from graphpatch.patch.patch import patches

from .models import fill, gathered, global_name
from .pool import one, ranks
from .test_to_peft import ADAPTERS, EVERY, FROZEN, IDS, made, options
from .training import _mark_pieces, chunks_of

RULES = {
    "lora": FROZEN + ADAPTERS["lora"],
    "dora": FROZEN + ADAPTERS["dora"],
    "parts": FROZEN + ADAPTERS["parts"],
    "norms": FROZEN + ADAPTERS["norms"],
    "vocabulary": FROZEN + ADAPTERS["vocabulary"],
    "experts": FROZEN + "patch ^decoder.layers[1:3].**.local_experts[*].{linear_fc1,linear_fc2} with lora(rank=4)",
    "head": FROZEN + "patch ^ with head.value(dropout=0)\npatch linear_qkv with lora(rank=2)",
    "embedding": FROZEN + "patch linear_proj with lora(rank=2)\ntrain embedding.**",
}


def sizes(name: str) -> dict[str, Any]:
    return {
        **options("mixtral" if name == "experts" else "llama"),
        "num_layers": 4,
        "tied": name == "embedding",
    }


def patched(name: str) -> tuple[list[Any], list[Any]]:
    chunks = chunks_of(**sizes(name))
    done = graphpatch.apply(chunks, graphpatch.parse(RULES[name]))
    for chunk in chunks:
        _mark_pieces(chunk)
        fill(chunk, lambda n: trains(name, n), seed=1)
    return chunks, done


def trains(name: str, parameter: str) -> bool:
    words = {"norms": "layernorm", "embedding": "word_embeddings", "head": "head"}
    tied = name == "embedding" and parameter.startswith("output_layer")
    return "lora" in parameter or (name in words and words[name] in parameter) or tied


def values(chunks: list[Any], name: str) -> dict[str, torch.Tensor]:
    """What trains, whole, by global name."""
    return {
        global_name(chunk, key): gathered(parameter, parameter.data)
        for chunk in chunks
        for key, parameter in chunk.named_parameters()
        if trains(name, key)
    }


def saved(name: str, folder: str) -> dict[str, torch.Tensor]:
    chunks, done = patched(name)
    graphpatch.save_adapter(done, folder)
    return values(chunks, name)


def loaded(name: str, folder: str, again: str) -> tuple[Any, bool]:
    chunks = chunks_of(**sizes(name))
    before = [p.detach().clone() for chunk in chunks for p in chunk.parameters()]
    done = graphpatch.load_adapter(chunks, folder)
    for chunk in chunks:
        _mark_pieces(chunk)
    found = values(chunks, name)
    graphpatch.save_adapter(done, again)
    # A second time it gives the weights alone; and others of the same rules take them too.
    for chunk in chunks:
        fill(chunk, lambda n: trains(name, n), seed=2)
    assert graphpatch.load_adapter(chunks, folder) == done and all(len(patches(chunk)) == 1 for chunk in chunks)
    second = values(chunks, name)
    for chunk in chunks:
        fill(chunk, lambda n: trains(name, n), seed=2)
    graphpatch.load_weights(done, folder)
    third = values(chunks, name)
    assert all(torch.equal(found[key], other[key]) for other in (second, third) for key in found)
    for patch in done:
        patch.revert()
    return found, all(map(torch.equal, before, (p for chunk in chunks for p in chunk.parameters())))


LAYOUTS = [
    ("lora", {"tp": 2, "pp": 2}, {"tp": 2}),
    ("dora", {"tp": 2}, {"pp": 2}),
    ("parts", {"tp": 2}, {}),
    ("parts", {}, {"tp": 2, "pp": 2}),
    ("norms", {"pp": 2, "vpp": 2}, {"tp": 2, "pp": 2}),
    ("vocabulary", {"tp": 2, "pp": 2}, {"pp": 2, "vpp": 2}),
    ("experts", {"dp": 2, "ep": 2}, {"tp": 2, "etp": 2}),
    ("experts", {"tp": 2, "etp": 2}, {"dp": 2, "ep": 2}),
    ("experts", {"dp": 2, "etp": 2}, {}),
    ("head", {"tp": 2, "pp": 2}, {}),
    ("embedding", {"tp": 2, "pp": 2}, {}),
    ("embedding", {}, {"tp": 2, "pp": 2}),
]


@pytest.mark.parametrize(("name", "wrote", "reads"), LAYOUTS, ids=str)
def test_written_at_one_layout_and_read_at_another(tmp_path, name, wrote, reads):
    folder, again = str(tmp_path / "adapter"), str(tmp_path / "again")
    whole: dict[str, torch.Tensor] = {}
    for part in ranks(saved, name, folder, **wrote):
        whole |= part
    tensors = load_file(f"{folder}/adapter.safetensors")
    if name == "embedding":
        whole.pop("output_layer.weight", None)  # a copy
    assert tensors.keys() == whole.keys()
    for key, value in tensors.items():
        assert torch.equal(value, whole[key]), key
    for found, reverted in ranks(loaded, name, folder, again, **reads):
        assert reverted and found
        for key, value in found.items():
            assert torch.equal(value, whole["embedding.word_embeddings.weight" if "output_layer" in key else key]), key
    assert load_file(f"{again}/adapter.safetensors").keys() == tensors.keys()
    assert (Path(again) / "adapter.safetensors").read_bytes() == (Path(folder) / "adapter.safetensors").read_bytes()
    said, other = (json.loads((Path(f) / "adapter.json").read_text()) for f in (folder, again))
    assert said["changes"] == other["changes"] and said["tensors"] == other["tensors"]
    assert said["base"]["weights"] == other["base"]["weights"]


def plain(name: str, folder: str) -> Any:
    """One process, by the functions that know nothing of ranks."""
    (chunk,) = chunks_of(**sizes(name))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # that numbers differ, say
        graphpatch.load_adapter(chunk, folder)
    return values([chunk], name)


@pytest.mark.parametrize("name", ["lora", "head", "norms"])
def test_one_process_reads_it_as_any_other(tmp_path, name):
    found = ranks(saved, name, str(tmp_path), tp=2, pp=2)
    here = one(plain, name, str(tmp_path))
    assert all(torch.equal(here[key], value) for part in found for key, value in part.items())


def into_another(folder: str) -> str:
    chunks = chunks_of(**{**sizes("lora"), "ffn_hidden_size": 96})
    done = graphpatch.apply(chunks, graphpatch.parse(RULES["lora"]))
    before = [p.detach().clone() for chunk in chunks for p in chunk.parameters()]
    with pytest.raises(graphpatch.Error) as caught:
        graphpatch.load_weights(done, folder)
    assert all(map(torch.equal, before, (p for chunk in chunks for p in chunk.parameters())))
    return caught.value.code


def test_weights_of_other_shapes_are_told_of(tmp_path):
    ranks(saved, "lora", str(tmp_path), tp=2)
    assert ranks(into_another, str(tmp_path), tp=2) == ["GP615"] * 2


def renamed(folder: str) -> list[str]:
    """An adapter loaded under another name beside the one that is there."""
    chunks = chunks_of(**sizes("lora"))
    first = graphpatch.load_adapter(chunks, folder)
    again = graphpatch.load_adapter(chunks, folder, adapter="other")
    assert first != again and all(len(patches(chunk)) == 2 for chunk in chunks)
    try:
        graphpatch.load_weights(again, folder)  # the names differ, and a rank has a part
        code = ""
    except graphpatch.Error as error:
        code = error.code
    same = [
        torch.equal(parameter, chunk.get_parameter(name.removesuffix("_other")))
        for chunk in chunks
        for name, parameter in chunk.named_parameters()
        if name.endswith("_other")
    ]
    for patch in reversed([*first, *again]):
        patch.revert()
    return [
        code,
        str(bool(same) and all(same)),
        *{type(m).__name__ for chunk in chunks for m in chunk.modules() if "LoRA" in type(m).__name__},
    ]


def test_under_another_name_beside_the_first(tmp_path):
    ranks(saved, "lora", str(tmp_path), tp=2)
    assert ranks(renamed, str(tmp_path), pp=2, vpp=2) == [["GP953", "True"]] * 2


def misfit(folder: str, change: str) -> tuple[str, bool]:
    chunks = chunks_of(**{**sizes("lora"), **({"ffn_hidden_size": 96} if change == "base" else {})})
    before = [type(m) for chunk in chunks for m in chunk.modules()]
    try:
        graphpatch.load_adapter(chunks, folder)
        code = ""
    except graphpatch.Error as error:
        code = error.code
    return code, before == [type(m) for chunk in chunks for m in chunk.modules()]


@pytest.mark.parametrize(("change", "code"), [("base", "GP611"), ("cut", "GP603"), ("absent", "GP601")])
def test_what_does_not_fit_is_refused_on_all_ranks(tmp_path, change, code):
    folder = tmp_path / "adapter"
    ranks(saved, "lora", str(folder), tp=2)
    if change == "cut":
        file = folder / "adapter.safetensors"
        file.write_bytes(file.read_bytes()[:-10])
    found = ranks(misfit, str(folder if change != "absent" else tmp_path / "no"), change, pp=2)
    assert found == [(code, True)] * 2


def test_two_chunks_and_one_state_dict():
    assert one(_two_chunks) == "GP529"


def _two_chunks() -> str:
    chunks = [*chunks_of(**sizes("lora")), *chunks_of(**sizes("lora"))]
    done = [graphpatch.apply(chunk, graphpatch.parse(RULES["lora"])) for chunk in chunks]
    with pytest.raises(graphpatch.Error) as caught:
        graphpatch.load_weights(done, done[0].adapter_state_dict())
    return caught.value.code


def on_llama(base: str, rules: str, folder: str) -> None:
    chunks = chunks_of(gather=True, **options("llama"))
    done = graphpatch.apply(chunks, graphpatch.parse(rules))
    graphpatch.load_weights(done, base) if "hf_llama" in rules else None
    for chunk in chunks:
        fill(chunk, lambda n: "lora" in n)
    graphpatch.save_adapter(done, folder)


def export(*arguments: str) -> tuple[int, str]:
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        return main(["export", *arguments]), said.getvalue()


@pytest.mark.parametrize("within", [True, False], ids=["maps in its rules", "maps given"])
def test_the_command_exports_what_ranks_trained(tmp_path, within):
    model = made("llama")
    model.save_pretrained(tmp_path / "base")
    rules = ("use hf_llama\n" if within else "") + f"{FROZEN}patch {EVERY} with lora(rank=4, alpha=8)"
    ranks(on_llama, str(tmp_path / "base"), rules, str(tmp_path / "adapter"), tp=2, pp=2)
    maps = [] if within else ["--maps", "hf_llama"]
    adapter, out = str(tmp_path / "adapter"), tmp_path / "out"
    if not within:
        code, said = export(adapter, str(out), "--format", "peft")
        assert code and "GP952" in said and "--maps hf_llama" in said and not out.exists()
    code, said = export(adapter, str(out), "--format", "peft", *maps)
    assert not code, said
    with torch.no_grad():
        bare = model(IDS).logits
        theirs = PeftModel.from_pretrained(model, out).eval()(IDS).logits
        model = made("llama")
        again = one(_logits, str(tmp_path / "base"), rules, adapter)
    assert (theirs - bare).abs().max() > 0.05
    torch.testing.assert_close(again, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())
    # A server's form needs to see the model whose names these are.
    code, said = export(adapter, str(tmp_path / "vllm"), "--for", "vllm", *maps)
    assert code and "--model" in said
    code, said = export(adapter, str(tmp_path / "vllm"), "--for", "vllm", "--model", str(tmp_path / "base"), *maps)
    assert not code, said
    with torch.no_grad():
        served = PeftModel.from_pretrained(made("llama"), tmp_path / "vllm").eval()(IDS).logits
    torch.testing.assert_close(served, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


def _logits(base: str, rules: str, adapter: str) -> torch.Tensor:
    (chunk,) = chunks_of(gather=True, **options("llama"))
    maps = graphpatch.apply(chunk, graphpatch.parse("use hf_llama"))
    graphpatch.load_weights(maps, base)
    maps.revert()
    graphpatch.load_adapter(chunk, adapter)
    with torch.no_grad():
        return chunk.eval()(IDS, torch.arange(12).expand(2, 12), None)
