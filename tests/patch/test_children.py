"""Ops that add whole modules below their target."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from torch import nn

import graphpatch
from graphpatch.ops import registry
from graphpatch.ops.op import Op, Target
from graphpatch.rewrites.rewrite import InPlace
from graphpatch.tree.tree import Tensor

from ..toys import LM, MLP
from .common import patch

RULES = "patch mlp with after_norm() expect 2\n"


class AfterNorm(Op):
    """A layer norm after the target, with a dropout that has no parameters, and a counter that is a buffer."""

    accepts: ClassVar = {"*": "tests.patch.test_children:AfterNormed"}
    level: ClassVar[int] = 60

    def adds(self, target: Target) -> dict[str, Tensor]:
        return {
            "after.norm.weight": Tensor((16,), "float32"),
            "after.norm.bias": Tensor((16,), "float32"),
            "after.calls": Tensor((1,), "float32", buffer=True),
        }


class Entry(NamedTuple):
    text: str


class After(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.LayerNorm(16), nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.norm(x))


class AfterNormed(InPlace):
    level: ClassVar[int] = 60
    entries: ClassVar[str] = "_after_norm"
    _after_norm: tuple[Entry, ...] = ()

    @classmethod
    def entry(cls, op: Op, parameter: str | None = None) -> Entry:
        return Entry(op.text())

    @classmethod
    def submodules(cls, entry: Any, module: nn.Module) -> Mapping[str, nn.Module]:
        return {"after": After()}

    @classmethod
    def initialise(cls, entry: Any, tensors: Mapping[str, torch.Tensor], module: nn.Module) -> None:
        tensors["after.norm.weight"].fill_(2.0)
        tensors["after.norm.bias"].fill_(1.0)
        tensors["after.calls"].zero_()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        return self.after(output) if self._after_norm else output


@pytest.fixture(autouse=True)
def known() -> Iterator[None]:
    registry.register("after_norm")(AfterNorm)
    yield
    del registry._registered["after_norm"]


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return LM(layers=2, hidden=16).eval()


def apply(model: nn.Module, more: str = "") -> graphpatch.Patch:
    return patch(model, RULES + more)


X = torch.arange(6).reshape(2, 3)
KEYS = [f"model.layers.{i}.mlp.after.{n}" for i in range(2) for n in ("norm.weight", "norm.bias", "calls")]


def test_children_are_registered_compute_and_go(model: nn.Module) -> None:
    before, keys, shapes = model(X), list(model.state_dict()), dict(model.named_modules())
    mlp = model.model.layers[1].mlp
    seen: list[torch.Tensor] = []
    handle = mlp.register_forward_hook(lambda m, i, o: seen.extend((i[0], o)))
    added = apply(model, "freeze ** except @new")
    assert sorted(added.adapter_state_dict()) == sorted(KEYS) == sorted(set(model.state_dict()) - set(keys))
    model(X)
    plain = MLP.forward(mlp, seen[0])
    assert torch.equal(seen[1], nn.functional.layer_norm(plain, (16,), torch.full((16,), 2.0), torch.ones(16)))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {k for k in KEYS if "norm" in k}
    with added.disabled():
        assert torch.equal(model(X), before)
    assert added.changes[0].path == "model.layers.0.mlp"
    handle.remove()
    added.revert()
    assert torch.equal(model(X), before)
    assert list(model.state_dict()) == keys
    assert dict(model.named_modules()) == shapes
    assert all(p.requires_grad for p in model.parameters())


def test_children_are_no_part_of_the_tree_and_the_plan_counts_them(model: nn.Module) -> None:
    rules = graphpatch.parse(RULES + "freeze **\ntrain after.norm")
    plan = rules.plan(model)
    assert plan.trainable == 64
    assert "6 keys added" in str(plan)
    added = plan.apply(model)
    assert graphpatch.select(model, "layers[*].mlp.**") == graphpatch.select(
        LM(layers=2, hidden=16), "layers[*].mlp.**"
    )
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {k for k in KEYS if "norm" in k}
    assert rules.plan(model).apply(model) == added


def test_freeze_rules_see_the_class_of_a_child(model: nn.Module) -> None:
    apply(model, "freeze **\ntrain ^model.layers[1].**:LayerNorm expect any")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {k for k in KEYS if "1.mlp.after.norm" in k}


def test_a_later_patch_does_not_take_an_earlier_ones_children_for_new(model: nn.Module) -> None:
    apply(model, "freeze ** except @new")
    second = graphpatch.apply(model, graphpatch.parse("patch self_attn with after_norm()\nfreeze ** except @new"))
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {k.replace("mlp", "self_attn") for k in KEYS if "norm" in k}
    second.revert()
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {k for k in KEYS if "norm" in k}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_have_their_own(model: nn.Module, copied: Any) -> None:
    before = model(X)
    apply(model)
    other = copied(model)
    assert torch.equal(other(X), model(X)) and not torch.equal(model(X), before)
    graphpatch.patches(other)[0].revert()
    assert torch.equal(other(X), before)
    assert hasattr(model.model.layers[0].mlp, "after")


def test_an_adapter_with_children_is_saved_and_loaded(model: nn.Module, tmp_path: Any) -> None:
    added = apply(model, "freeze ** except @new")
    with torch.no_grad():
        for p in added.trainable_parameters():
            p.normal_()
    graphpatch.save_adapter(added, tmp_path / "a")
    torch.manual_seed(0)
    other = LM(layers=2, hidden=16).eval()
    graphpatch.load_adapter(other, tmp_path / "a")
    assert torch.equal(other(X), model(X))


def test_on_meta_and_then_with_values(model: nn.Module) -> None:
    with torch.device("meta"):
        empty = LM(layers=2, hidden=16).eval()
    apply(empty)
    assert all(t.is_meta for t in empty.state_dict().values())
    apply(model)
    empty.to_empty(device="cpu")
    empty.load_state_dict(model.state_dict())
    assert torch.equal(empty(X), model(X))


def test_train_and_eval_mode_is_that_of_the_target(model: nn.Module) -> None:
    apply(model)
    assert not model.model.layers[0].mlp.after.drop.training
    assert apply(LM(layers=2, hidden=16).train()).model.model.layers[0].mlp.after.drop.training


def test_a_name_that_is_taken_is_refused_before_anything_changes(model: nn.Module) -> None:
    model.model.layers[1].mlp.after = nn.Identity()
    with pytest.raises(graphpatch.Error, match=r"layers\.1\.mlp.*called `after` already"):
        apply(model)
    assert not hasattr(model.model.layers[0].mlp, "after")
