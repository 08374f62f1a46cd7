"""`map` statements: another family's checkpoint into this model, and back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import graphpatch

from ..patch.common import patch

FREEZE = "patch a with scale.output(1.0)\nfreeze ** except @new\n"


class Net(nn.Module):
    """`layers.N.qkv`, `layers.N.up`, and a stack of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.layers = nn.ModuleList(nn.ModuleDict({"qkv": nn.Linear(4, 16), "up": nn.Linear(4, 6)}) for _ in range(2))
        self.experts = nn.Parameter(torch.zeros(3, 2, 4))
        self.turned = nn.Parameter(torch.zeros(5, 3))
        self.register_buffer("passing", torch.zeros(2), persistent=False)


MAPS = """
map h[i].{q,k,v}.{weight,bias} -> layers[$i].qkv.{weight,bias} using qkv.interleave(heads=4, groups=2)
map h[i].{gate,up}.weight -> layers[$i].up.weight using concat(dim=0)
map h[i].{gate,up}.bias -> layers[$i].up.bias using concat()
map mlp.experts[e].w -> experts using stack()
map across -> turned using transpose(0, 1)
map stem.** -> a.**
map rotary.inv_freq -> none
"""
MAPS = MAPS.replace(
    "map h[i].{q,k,v}.{weight,bias} -> layers[$i].qkv.{weight,bias}",
    "map h[i].{q,k,v}.weight -> layers[$i].qkv.weight using qkv.interleave(heads=4, groups=2)\n"
    "map h[i].{q,k,v}.bias -> layers[$i].qkv.bias",
)


def theirs() -> dict[str, Tensor]:
    torch.manual_seed(0)
    found: dict[str, Tensor] = {"stem.weight": torch.randn(4, 4), "stem.bias": torch.randn(4)}
    for i in range(2):
        for name, rows in (("q", 8), ("k", 4), ("v", 4), ("gate", 3), ("up", 3)):
            found[f"h.{i}.{name}.weight"], found[f"h.{i}.{name}.bias"] = torch.randn(rows, 4), torch.randn(rows)
    found |= {f"mlp.experts.{e}.w": torch.randn(2, 4) for e in range(3)}
    return {**found, "across": torch.randn(3, 5), "rotary.inv_freq": torch.randn(2)}


def loaded(text: str, source: Any, model: nn.Module | None = None) -> tuple[nn.Module, graphpatch.Patch]:
    model = model or Net()
    applied = patch(model, FREEZE + text)
    graphpatch.load_weights(applied, source)
    return model, applied


def test_every_layout_and_the_way_back(tmp_path):
    given = theirs()
    save_file(given, tmp_path / "model.safetensors")
    for source in (given, tmp_path, tmp_path / "model.safetensors"):
        model, applied = loaded(MAPS, source)
        qkv = model.layers[1]["qkv"].weight
        # Two groups, each of two queries of width two, a key and a value.
        q, k, v = (given[f"h.1.{n}.weight"] for n in "qkv")
        assert torch.equal(qkv, torch.cat([q[:4], k[:2], v[:2], q[4:], k[2:], v[2:]]))
        assert torch.equal(model.layers[0]["up"].bias, torch.cat([given["h.0.gate.bias"], given["h.0.up.bias"]]))
        assert torch.equal(model.experts[2], given["mlp.experts.2.w"])
        assert torch.equal(model.turned, given["across"].T) and torch.equal(model.a.bias, given["stem.bias"])
    graphpatch.save_weights(applied, tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == given.keys() - {"rotary.inv_freq"}
    assert all(torch.equal(back[key], given[key]) for key in back)


def test_two_names_may_change_places():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)

    source = {"a.weight": torch.zeros(2, 2), "b.weight": torch.ones(2, 2)}
    model, _ = loaded("map a.weight -> b.weight\nmap b.weight -> a.weight", source, Two())
    assert torch.equal(model.a.weight, source["b.weight"]) and torch.equal(model.b.weight, source["a.weight"])


@pytest.mark.parametrize("code, maps, change", [
    ("GP471", MAPS + "map stem.weight -> a.weight", {}),
    ("GP471", MAPS + "map rotary.inv_freq -> turned", {}),
    ("GP472", MAPS, {"h.1.k.weight": None}),
    ("GP473", MAPS.replace("using stack()", ""), {}),
    ("GP660", MAPS.replace("stack()", "stak()"), {}),
    ("GP660", MAPS.replace("stack()", "stack(5)"), {}),
    ("GP660", MAPS.replace("stack()", "stack(axis=0)"), {}),
    ("GP661", MAPS, {"across": None, "extra": torch.zeros(1)}),
    ("GP662", MAPS, {"stem.bias": torch.zeros(5)}),
])  # fmt: skip
def test_what_does_not_fit_is_told_and_nothing_changes(code, maps, change):
    given = {**theirs(), **change}
    given = {key: value for key, value in given.items() if value is not None}
    if "rotary.inv_freq -> turned" in maps:
        maps = maps.replace("map rotary.inv_freq -> none", "")
    model = Net()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(graphpatch.Error) as caught:
        loaded(maps, given, model)
    assert caught.value.code == code, str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_missing_and_unexpected_keys_are_named():
    given = {key: value for key, value in theirs().items() if key != "across"} | {"extra": torch.zeros(1)}
    with pytest.raises(graphpatch.Error) as caught:
        loaded(MAPS.replace("map across -> turned using transpose(0, 1)", ""), given)
    assert "fits no key" not in str(caught.value) and "- turned   missing" in str(caught.value)
    with pytest.raises(graphpatch.Error) as caught:
        loaded(MAPS, given)
    assert "fits no key: map across -> turned using transpose(0, 1)" in str(caught.value)
    assert "+ extra   unexpected" in str(caught.value)


def test_a_way_back_that_is_lost_is_told(tmp_path):
    _, applied = loaded(
        MAPS.replace("h[i].{gate,up}.bias -> layers[$i]", "h[i].{gate,up}.bias -> layers[0 + $i]"), theirs()
    )
    with pytest.raises(graphpatch.Error, match="GP474"):
        graphpatch.save_weights(applied, tmp_path)


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(2, 2, bias=False)
        self.layers = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(3))


def stack(prefix: str = "layers") -> dict[str, Tensor]:
    return {"a.weight": torch.ones(2, 2), **{f"{prefix}.{i}.weight": torch.full((2, 2), float(i)) for i in range(3)}}


@pytest.mark.parametrize(
    "index, left", [("1", [1]), ("-1", [2]), ("i in 1:", [1, 2]), ("::2", [0, 2]), ("*", [0, 1, 2])]
)
def test_an_index_chooses_the_keys_that_a_map_speaks_of(index, left):
    biases = {f"layers.{i}.bias": torch.ones(2) for i in left}
    loaded(f"map layers[{index}].bias -> none", stack() | biases, Stack())
    others = {f"layers.{i}.bias": torch.ones(2) for i in range(3) if i not in left}
    if others:
        with pytest.raises(graphpatch.Error, match=f"{len(others)} too many"):
            loaded(f"map layers[{index}].bias -> none", stack() | biases | others, Stack())


@pytest.mark.parametrize("maps, there", [
    ("map h[i in 1:].weight -> layers[$i].weight", {1: "h.1", 2: "h.2"}),
    ("map layers[0].weight -> layers[2].weight\nmap layers[2].weight -> layers[0].weight", {0: "layers.2", 2: "layers.0"}),
])  # fmt: skip
def test_indices_on_the_way_back(maps, there, tmp_path):
    values = stack()
    given = {"a.weight": values["a.weight"]}
    given |= {f"{there.get(i, f'layers.{i}')}.weight": values[f"layers.{i}.weight"] for i in range(3)}
    model, applied = loaded(maps, given, Stack())
    assert [int(layer.weight[0, 0]) for layer in model.layers] == [0, 1, 2]
    graphpatch.save_weights(applied, tmp_path)
    back = load_file(tmp_path / "model.safetensors")
    assert back.keys() == given.keys() and all(torch.equal(back[key], given[key]) for key in back)


@pytest.mark.parametrize("code, maps", [
    ("GP473", "map {x,y,z}.weight -> {a,b}.weight using concat()"),
    ("GP220", "map h[i].weight -> layers[1 // $i].weight"),
    ("GP222", "map h[i].weight -> layers[1.0 * $i].weight"),
])  # fmt: skip
def test_maps_that_mean_nothing_are_told(code, maps):
    given = stack("h") | {f"{name}.weight": torch.ones(2, 2) for name in "xyz"}
    with pytest.raises(graphpatch.Error) as caught:
        loaded(maps, given, Stack())
    assert caught.value.code == code, str(caught.value)


def test_heads_must_be_those_of_the_rows():
    for wrong in ("heads=8, groups=2", "heads=3, groups=2", "heads=4, groups=0"):
        with pytest.raises(graphpatch.Error, match="GP660"):
            loaded(MAPS.replace("heads=4, groups=2", wrong), theirs())


def test_a_tied_weight_has_one_value():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.head = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
            self.head.weight = self.a.weight

    ones = torch.ones(2, 2)
    for same in ({"z": ones}, {"z": ones, "head.weight": ones.clone()}):
        assert torch.equal(loaded("map z -> a.weight", same, Tied())[0].a.weight, ones)
    model = Tied()
    before = model.a.weight.detach().clone()
    with pytest.raises(graphpatch.Error, match="GP664"):
        loaded("map z -> a.weight", {"z": ones, "head.weight": 2 * ones}, model)
    assert torch.equal(model.a.weight, before)


def test_what_is_no_tensor_is_told():
    with pytest.raises(graphpatch.Error, match="`step` is no tensor"):
        loaded("map z -> a.weight", stack() | {"step": 3}, Stack())


def test_adapters_on_the_model_are_no_part_of_its_checkpoint(tmp_path):
    model, bare = Net(), Net()
    adapter = patch(model, "patch :Linear with lora(rank=2)\nfreeze ** except @new", adapter="math")
    before = {key: value.clone() for key, value in adapter.adapter_state_dict().items()}
    graphpatch.load_weights(patch(model, FREEZE + MAPS), theirs())
    loaded(MAPS, theirs(), bare)
    for key, value in bare.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    assert all(torch.equal(value, before[key]) for key, value in adapter.adapter_state_dict().items())
    family = next(p for p in graphpatch.patches(model) if p.id != adapter.id)
    graphpatch.save_weights(family, tmp_path)
    back = load_file(tmp_path / "model.safetensors")
    assert back.keys() == theirs().keys() - {"rotary.inv_freq"}
    assert all(torch.equal(value, theirs()[key]) for key, value in back.items())


def test_a_model_on_the_meta_device_is_filled_or_left():
    class Saved(nn.Module):
        def __init__(self, saved: bool = True) -> None:
            super().__init__()
            self.a, self.head = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False, dtype=torch.bfloat16)
            self.foot = nn.Linear(2, 2, bias=False)
            self.foot.weight = self.a.weight
            self.head.weight.mark = 7
            self.head.requires_grad_(False)
            self.register_buffer("count", torch.tensor(3), persistent=saved)

    given = {"z": torch.randn(2, 2), "head.weight": torch.randn(2, 2), "count": torch.tensor(5)}
    with torch.device("meta"):
        model, half, adapted = Saved(), Saved(saved=False), Saved()
    made = patch(model, "patch a with softcap.output(2.0)\nmap z -> a.weight")
    graphpatch.load_weights(made, given)
    assert torch.equal(model.a.weight, given["z"]) and model.foot.weight is model.a.weight
    assert torch.equal(model.head.weight, given["head.weight"].bfloat16())
    assert not model.head.weight.requires_grad and model.a.weight.requires_grad
    assert model.head.weight.mark == 7 and model.count == 5
    model.a(given["z"]).sum().backward()
    assert model.a.weight.grad is not None
    made.revert()
    assert not any(t.is_meta for t in model.state_dict().values()) and given["z"].grad is None

    made = patch(half, "patch a with softcap.output(2.0)\nmap z -> a.weight\nmap count -> none")
    with pytest.raises(graphpatch.Error, match="`count` is on the meta device, and a checkpoint has no values") as told:
        graphpatch.load_weights(made, given)
    assert told.value.code == "GP616"
    assert all(t.is_meta for t in (*half.parameters(), *half.buffers()))

    made = patch(adapted, "patch a with softcap.output(2.0)\nmap z -> a.weight")
    patch(adapted, "patch head with lora(rank=2)")
    with pytest.raises(graphpatch.Error, match=r"GP616: `head\.lora_A`"):
        graphpatch.load_weights(made, given)
    assert all(p.is_meta for p in adapted.parameters())
