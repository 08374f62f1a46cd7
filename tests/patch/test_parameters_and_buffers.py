"""Ops on a parameter of a module, and ops that add buffers."""

from __future__ import annotations

import copy
import pickle
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from torch import nn

import graphpatch
from graphpatch import Op
from graphpatch.rewrites.rewrite import InPlace
from graphpatch.tree.tree import Tensor, Tree

from .common import patch, refused, state


class Experts(nn.Module):
    """Two stacks of matrices, which are parameters and no modules."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(2, 3, 4))
        self.down = nn.Parameter(torch.randn(2, 4, 3))

    def forward(self, x):
        return torch.einsum("bi,eoi->beo", x, self.up)


@graphpatch.register("tests.gain")
class Gain(Op):
    """Multiplies by a factor a parameter, and remembers what that was at first."""

    accepts: ClassVar = {"torch.nn.modules.linear.Linear": f"{__name__}:Gained"}
    accepts_parameters: ClassVar = {f"{__name__}.Experts": f"{__name__}:Gained"}

    def adds(self, target):
        name = f"{target.parameter}_gain" if target.parameter else "gain"
        width = target.tensor.shape[1] if target.parameter else target.config["width"]
        return {name: Tensor((width,), "float32"), f"{name}_init": Tensor((width,), "float32", False, buffer=True)}


class Held(NamedTuple):
    name: str
    text: str = "gain"


class Gained(InPlace):
    entries: ClassVar[str] = "_gains"
    _gains: tuple[Held, ...] = ()

    @classmethod
    def entry(cls, op, parameter=None):
        return Held(f"{parameter}_gain" if parameter else "gain")

    @classmethod
    def initialise(cls, entry, tensors, module):
        assert getattr(module, entry.name) is tensors[entry.name]
        tensors[entry.name].data.fill_(2)
        tensors[f"{entry.name}_init"].fill_(3)

    def forward(self, x: Any) -> Any:
        y = super().forward(x)
        for held in self._gains:
            y = y * getattr(self, held.name) + getattr(self, f"{held.name}_init")
        return y


def model() -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(4, 4), Experts())
    made.config = {"width": 4}
    return made


BOTH = "patch ^1.up | ^1.down with tests.gain()\nfreeze ** except @new"


def test_two_parameters_of_one_module_are_two_targets():
    m = model()
    plan = graphpatch.parse(BOTH).plan(m)
    assert {c.path for c in plan.changes} == {"1.up", "1.down"}
    assert (plan.totals.parameters_added, plan.totals.bytes_added, plan.totals.keys_added) == (7, 56, 4)
    before, x = state(m), torch.randn(2, 4)
    wanted = m(x) * 2 + 3
    p = patch(m, "patch ^1.up with tests.gain()\nfreeze ** except @new")
    assert torch.allclose(m(x), wanted)
    q = patch(m, "patch ^1.down with tests.gain()\nfreeze ** except @new | *_gain")
    assert set(m.state_dict()) - set(model().state_dict()) == {
        "1.up_gain", "1.up_gain_init", "1.down_gain", "1.down_gain_init",
    }  # fmt: skip
    p.revert()
    q.revert()
    assert state(m) == before


def test_buffers_are_of_the_adapter_and_never_train(tmp_path):
    m = model()
    p = patch(m, "patch ^0 with tests.gain()\nfreeze ** except @new\ntrain @new")
    assert [p.shape for p in p.trainable_parameters()] == [(4,)]
    assert list(p.adapter_state_dict()) == ["0.gain", "0.gain_init"] and "gain_init" in m[0]._buffers
    assert graphpatch.parse("patch ^0 with tests.gain()\ntrain @new").plan(model()).totals.trainable == 4 + 20 + 48
    assert Tree.of(m).fingerprint == Tree.of(model()).fingerprint
    for twin in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        assert torch.equal(twin[0].gain_init, m[0].gain_init)
        graphpatch.patches(twin)[0].revert()
        assert set(twin.state_dict()) == set(model().state_dict())
    m[0].gain_init.fill_(7)
    graphpatch.save_adapter(p, tmp_path)
    other = model()
    graphpatch.load_adapter(other, tmp_path)
    assert torch.equal(other[0].gain_init, torch.full((4,), 7.0)) and torch.equal(other[0].gain, m[0].gain)
    x = torch.randn(2, 4)
    assert torch.equal(other(x), m(x))


def test_loading_an_adapter_initialises_nothing(tmp_path, monkeypatch):
    p = patch(model(), BOTH)
    graphpatch.save_adapter(p, tmp_path)
    monkeypatch.setattr(Gained, "initialise", lambda *_: 1 / 0)
    loaded = graphpatch.load_adapter(model(), tmp_path)
    for name, tensor in p.adapter_state_dict().items():
        assert torch.equal(loaded.adapter_state_dict()[name], tensor)


def test_again_on_the_same_parameter_and_on_one_of_an_unknown_module():
    m = model()
    patch(m, "patch ^1.up with tests.gain() as one")
    assert "1.up" in refused("GP417", m, "\n\npatch ^1.up with tests.gain()")
    with pytest.raises(graphpatch.PlanError, match="does not accept `weight`, a parameter of Linear"):
        graphpatch.parse("patch ^0.weight with tests.gain()").plan(model())


def test_the_config_around_a_target_tells_targets_apart():
    wide = model()
    wide.config = {"width": 2}
    both = nn.ModuleDict({"a": model(), "b": wide})
    plan = graphpatch.parse("patch ^a[0] | ^b[0] with tests.gain()").plan(both)
    assert sorted(step.adds["gain"].shape for step in plan.steps) == [(2,), (4,)]
