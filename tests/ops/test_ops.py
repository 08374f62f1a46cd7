"""Ops as data: arguments, tables, refusals. No torch is needed for any of it."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from typing import ClassVar

import pytest

from graphpatch.ops import registry
from graphpatch.ops.arguments import ArgumentError, UnknownOp, arguments, build
from graphpatch.ops.op import Op, Refusal, Target
from graphpatch.tree.tree import Signature, Tensor


def linear(out: int = 8, in_: int = 4, dtype: str = "float32") -> Signature:
    return Signature(
        ("torch.nn.modules.linear.Linear", "torch.nn.modules.module.Module"),
        {"in_features": in_, "out_features": out, "bias": None},
        {"weight": Tensor((out, in_), dtype)},
    )


def wrong(name: str, *positional, **named) -> ArgumentError:
    with pytest.raises(ArgumentError) as caught:
        build(name, positional, named)
    return caught.value


def test_the_text_of_an_op_is_what_a_rule_would_write():
    assert build("lora", [], {"rank": 16, "alpha": 32}).text() == "lora(rank=16, alpha=32)"
    assert build("lora", [16, 0.5], {"adapter": "math"}).text() == 'lora(rank=16, alpha=0.5, adapter="math")'
    assert build("set", [], {"a": None, "b": True, "c": (1, 2)}).text() == "set(a=none, b=true, c=[1, 2])"
    assert build("replace", ["a.B"], {"eps": 1e-6}).text() == 'replace(class="a.B", eps=1e-06)'
    assert build("lora", [], {}).arguments()["rank"] == 8


@pytest.mark.parametrize(
    ("named", "says"),
    [
        ({"rank": 0}, "at least 1, not 0"),
        ({"rank": True}, "whole number, not true"),
        ({"rank": 2.0}, "whole number"),
        ({"rank": "8"}, 'whole number, not "8"'),
        ({"alpha": float("nan")}, "finite"),
        ({"alpha": float("inf")}, "finite"),
        ({"dropout": 1}, "less than 1, not 1"),
        ({"dropout": -0.1}, "at least 0"),
        ({"use_rslora": 1}, "true or false, not 1"),
        ({"init": "kaimin"}, 'one of "kaiming", "gaussian"'),
        ({"dtype": "int8"}, "one of"),
        ({"adapter": "a.b"}, "name of letters"),
    ],
)
def test_a_value_that_does_not_fit_is_named_with_what_would(named, says):
    error = wrong("lora", **named)
    assert says in error.message and error.argument == next(iter(named)) and not error.unknown
    assert "pydantic" not in str(error)


@pytest.mark.parametrize(
    ("given", "meant"),
    [("r", "rank"), ("lora_alpha", "alpha"), ("lora_dropout", "dropout"), ("dim", "rank"), ("rnak", "rank")],
)
def test_names_from_elsewhere_and_typos_are_understood(given, meant):
    error = wrong("lora", **{given: 1})
    assert error.unknown and error.suggestions == [meant] and f"no argument `{given}`" in error.message
    assert error.hint.startswith("Arguments: rank, alpha, dropout, use_rslora, init, dtype, adapter, dora, bias, ")


def test_positions_missing_and_repeated_arguments():
    assert wrong("lora", 8, "x").argument == 1
    assert "at most 14" in wrong("lora", *range(15)).message
    assert "needs `by`" in wrong("scale.output").message
    assert "given twice" in wrong("lora", 8, rank=8).message
    assert "import path" in wrong("replace", "Norm").message
    assert "which attribute" in wrong("set").message
    assert arguments(registry.find("replace")) == ["class"]


def test_an_unknown_op_suggests_the_nearest():
    with pytest.raises(UnknownOp) as caught:
        build("loraa", [], {})
    assert caught.value.suggestions == ["lora"]


def test_what_lora_adds():
    op = build("lora", [], {"rank": 2})
    assert op.adds(Target("q", linear())) == {"lora_A": Tensor((2, 4), "float32"), "lora_B": Tensor((8, 2), "float32")}
    assert {t.dtype for t in op.adds(Target("q", linear(dtype="bfloat16"))).values()} == {"float32"}
    assert {t.dtype for t in op.adds(Target("q", linear(dtype="float64"))).values()} == {"float64"}
    assert {t.dtype for t in build("lora", [], {"dtype": "bfloat16"}).adds(Target("q", linear())).values()} == {
        "bfloat16"
    }
    packed = Signature(linear().mro, {"in_features": 4, "out_features": 8}, {"weight": Tensor((16, 1), "uint8")})
    assert op.adds(Target("q", packed))["lora_B"] == Tensor((8, 2), "float32")


def test_adapters_have_names_slots_and_keys():
    op = build("lora", [], {})
    named = op.named("math")
    assert named.keys == ("lora_A_math", "lora_B_math") and op.named(None) is op
    assert named.named("other").adapter == "math"
    assert not op.slots() & named.slots() and named.slots() == build("lora", [4], {"adapter": "math"}).slots()


def test_scales():
    assert build("lora", [], {"rank": 4}).scale == 1
    assert build("lora", [], {"rank": 4, "alpha": 8}).scale == 2
    assert build("lora", [], {"rank": 4, "alpha": 8, "use_rslora": True}).scale == 4


def test_targets_are_refused_with_a_reason():
    op = build("lora", [], {})
    attention = Signature(("torch.nn.modules.activation.MultiheadAttention",))
    with pytest.raises(Refusal, match="never calls the module") as caught:
        op.check(Target("a.out_proj", linear(), None, attention))
    assert caught.value.code == "GP503"
    lazy = Signature(("torch.nn.modules.linear.LazyLinear", "torch.nn.modules.lazy.LazyModuleMixin"))
    with pytest.raises(Refusal, match="shape yet"):
        op.check(Target("a", lazy))
    with pytest.raises(Refusal, match="two dimensions"):
        op.check(Target("a", Signature(linear().mro, {}, {"weight": Tensor((2, 3, 4), "float32")})))
    taken = Signature(linear().mro, linear().attributes, {**linear().parameters, "lora_A": Tensor((1,), "float32")})
    with pytest.raises(Refusal, match="`lora_A` already"):
        op.check(Target("a", taken))
    with pytest.raises(Refusal, match="no forward of its own"):
        build("scale.output", [2], {}).check(Target("a", Signature(("torch.nn.modules.container.ModuleList",))))


def test_ops_are_registered_by_decorator(monkeypatch):
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))

    @registry.register("mypkg.noise")
    class Noise(Op):
        std: float

    assert registry.find("mypkg.noise") is Noise and "mypkg.noise" in registry.names()
    assert build("mypkg.noise", [0.5], {}).text() == "mypkg.noise(std=0.5)"
    with pytest.raises(ValueError, match="already"):
        registry.register("mypkg.noise")(type("Other", (Op,), {"__module__": "elsewhere"}))
    with pytest.raises(ValueError, match="already"):
        registry.register("lora")(type("Lora", (Op,), {"__module__": "elsewhere"}))
    with pytest.raises(ValueError, match="cannot name"):
        registry.register("my op")


def test_a_class_is_added_to_an_op_by_a_row():
    lora = registry.find("lora")
    before = lora.accepts
    try:
        registry.accept("lora", "mypkg.Fast", "mypkg.patches:LoraFast")
        assert lora.accepts["mypkg.Fast"] == "mypkg.patches:LoraFast" and before.keys() < lora.accepts.keys()
    finally:
        lora.accepts = before
    with pytest.raises(KeyError):
        registry.accept("loraa", "a.B", "a:B")
    with pytest.raises(ValueError, match=r"package\.module:ClassName"):
        registry.accept("lora", "a.B", "a.B")


class FromEntryPoint(Op):
    accepts: ClassVar = {"*": "x:Y"}
    depth: int = 1


def test_an_entry_point_is_loaded_for_its_own_name_only(monkeypatch):
    loaded = []

    class Point:
        def __init__(self, name, value):
            self.name, self.value, self._value = name, str(value), value

        def load(self):
            loaded.append(self.name)
            if isinstance(self._value, Exception):
                raise self._value
            return self._value

    points = [Point("mine", FromEntryPoint), Point("broken", RuntimeError("boom")), Point("odd", dict)]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points)
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    assert {"mine", "broken", "lora"} <= set(registry.names()) and not loaded
    registry.find("lora")
    assert not loaded
    assert build("mine", [3], {}).text() == "mine(depth=3)" and loaded == ["mine"]
    for name in ("broken", "odd"):
        with pytest.raises(UnknownOp, match="could not be loaded"):
            build(name, [], {})


def test_no_torch_is_imported():
    code = (
        "import sys; from graphpatch.ops import registry;"
        "[registry.find(n) for n in registry.names()]; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
