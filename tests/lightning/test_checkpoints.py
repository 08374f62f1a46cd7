"""What a checkpoint holds, and that a run resumed from one is the run that was not stopped."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import save_file

import graphpatch
from graphpatch.lightning import ModelTransform, ResumableDataLoader, load_from_checkpoint

from .common import Module, data, factors, trainer

RULES = "patch linear_qkv | linear_proj with lora(rank=2)\nfreeze ** except @new"


def lora() -> ModelTransform:
    return ModelTransform(graphpatch.parse(RULES))


def fitted(folder: Any, epochs: int = 2, path: Any = None, module: Any = None, **options: Any) -> Module:
    module = module or Module()
    torch.manual_seed(5)
    trainer(folder, lora(), max_epochs=epochs, **options).fit(module, data(shuffle=True), ckpt_path=path)
    return module


def checkpointed(folder: Any, epochs: int = 2, weights_only: bool = False) -> tuple[Module, str]:
    module, saver = Module(), ModelCheckpoint(folder, save_last=True, save_weights_only=weights_only)
    torch.manual_seed(5)
    t = trainer(folder, lora(), saver, max_epochs=epochs, enable_checkpointing=True)
    t.fit(module, data(shuffle=True))
    return module, saver.last_model_path


@pytest.mark.parametrize("weights_only", [False, True])
def test_it_holds_the_adapter_and_the_statistics_that_changed_and_not_the_base(tmp_path, weights_only):
    module, path = checkpointed(tmp_path, weights_only=weights_only)
    held = torch.load(path, weights_only=True)
    statistics = {"net.norm.running_mean", "net.norm.running_var", "net.norm.num_batches_tracked"}
    assert set(held["state_dict"]) == {*factors(module), *statistics}
    assert held["graphpatch"]["patches"][0]["rules"]["files"]
    if not weights_only:
        assert len(held["optimizer_states"][0]["state"]) == 8


def test_resumed_at_the_end_of_an_epoch_it_is_the_run_that_was_not_stopped(tmp_path):
    whole = fitted(tmp_path, 4)
    first, path = checkpointed(tmp_path, 2)
    torch.manual_seed(99)
    second = Module()
    trainer(tmp_path, lora(), max_epochs=4).fit(second, data(shuffle=True), ckpt_path=path)
    assert first.losses + second.losses == whole.losses
    assert all(torch.equal(a, b) for a, b in zip(second.state_dict().values(), whole.state_dict().values()))


def test_a_checkpoint_of_other_rules_is_refused_with_the_difference(tmp_path):
    _, path = checkpointed(tmp_path)
    other = ModelTransform(graphpatch.parse(RULES.replace("rank=2", "rank=3")))
    with pytest.raises(graphpatch.Error) as caught:
        trainer(tmp_path, other, max_epochs=4).fit(Module(), data(), ckpt_path=path)
    assert caught.value.code == "GP831"
    assert "-patch linear_qkv | linear_proj with lora(rank=2)" in str(caught.value)
    assert "+patch linear_qkv | linear_proj with lora(rank=3)" in str(caught.value)


def test_a_missing_factor_and_a_checkpoint_of_the_base_are_told(tmp_path):
    _, path = checkpointed(tmp_path)
    held = torch.load(path, weights_only=True)
    del held["state_dict"]["net.layers.0.linear_qkv.lora_B"]
    torch.save(held, tmp_path / "less.ckpt")
    with pytest.raises(graphpatch.Error, match=r"lacks 1 tensors that train: net\.layers\.0\.linear_qkv\.lora_B"):
        trainer(tmp_path, lora(), max_epochs=4).fit(Module(), data(), ckpt_path=tmp_path / "less.ckpt")
    t = trainer(tmp_path, max_epochs=1)
    t.fit(Module(), data())
    t.save_checkpoint(tmp_path / "base.ckpt")
    with pytest.raises(graphpatch.Error, match="base_checkpoint"):
        trainer(tmp_path, lora(), max_epochs=4).fit(Module(), data(), ckpt_path=tmp_path / "base.ckpt")


def test_validate_and_test_from_a_checkpoint(tmp_path):
    module, path = checkpointed(tmp_path)
    expected = trainer(tmp_path, lora()).validate(module, data(), verbose=False)
    fresh = Module()
    assert trainer(tmp_path, lora()).validate(fresh, data(), ckpt_path=path, verbose=False) == expected
    assert (
        trainer(tmp_path, lora()).test(Module(), data(), ckpt_path=path, verbose=False)[0]["test"] == expected[0]["val"]
    )


def test_base_and_adapter_are_two_checkpoints(tmp_path):
    base = Module()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(1.5)
    save_file(base.net.state_dict(), tmp_path / "base.safetensors")
    torch.save({"state_dict": base.state_dict()}, tmp_path / "base.ckpt")
    for name in ("base.safetensors", "base.ckpt"):
        module, saver = Module(), ModelCheckpoint(tmp_path / name.replace(".", "_"), save_last=True)
        callback = ModelTransform(graphpatch.parse(RULES), base_checkpoint=tmp_path / name)
        trainer(tmp_path, callback, saver, enable_checkpointing=True).fit(module, data())
        assert torch.equal(module.net.layers[0].linear_qkv.weight, base.net.layers[0].linear_qkv.weight)
        loaded = load_from_checkpoint(Module, saver.last_model_path, base=tmp_path / name)
        assert type(loaded) is Module and factors(loaded) == factors(module)
        for key, tensor in module.state_dict().items():
            assert torch.equal(tensor, loaded.state_dict()[key]), key
        x = torch.randn(3, 8)
        assert torch.equal(loaded.eval()(x), module.eval()(x))


def test_a_base_that_does_not_fit(tmp_path):
    save_file({"layers.0.linear_qkv.weight": torch.zeros(8, 8)}, tmp_path / "part.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(b"\x10\x00")
    for source, code in (("part.safetensors", "GP821"), ("torn.safetensors", "GP820"), ("absent.ckpt", "GP820")):
        callback, module = ModelTransform(graphpatch.parse(RULES), base_checkpoint=tmp_path / source), Module()
        before = {k: v.clone() for k, v in module.state_dict().items()}
        with pytest.raises(graphpatch.Error) as caught:
            trainer(tmp_path, callback).fit(module, data())
        assert caught.value.code == code, str(caught.value)
        assert all(torch.equal(v, module.state_dict()[k]) for k, v in before.items()) and not factors(module)


def test_saved_later_and_loaded_by_hand_it_is_the_same(tmp_path):
    module = fitted(tmp_path)
    t = trainer(tmp_path, lora())
    t.validate(module, data(), verbose=False)
    t.save_checkpoint(tmp_path / "later.ckpt")
    held = torch.load(tmp_path / "later.ckpt", weights_only=True)["state_dict"]
    assert set(factors(module)) < set(held) and "net.layers.0.linear_qkv.weight" not in held
    module.load_state_dict(held)
    with pytest.raises(RuntimeError, match="lora_A"):
        module.load_state_dict({k: v for k, v in held.items() if "lora_A" not in k})


def resumable() -> ResumableDataLoader:
    return ResumableDataLoader(data(8).dataset, batch_size=4, shuffle=True)


@pytest.mark.parametrize("step", [3, 8, 11, 16])
def test_resumed_within_an_epoch_with_a_loader_that_can(tmp_path, step):
    def fitted(module: Module, loader: Any, path: Any = None, **options: Any) -> Module:
        torch.manual_seed(5)
        saver = ModelCheckpoint(tmp_path, every_n_train_steps=step, save_top_k=-1, filename="{step}")
        options = {"enable_checkpointing": True, "max_epochs": 3, **options}
        trainer(tmp_path, lora(), saver, **options).fit(module, loader, ckpt_path=path)
        return module

    whole = fitted(Module(), resumable())
    torch.manual_seed(77)
    rest = fitted(Module(), resumable(), tmp_path / f"step={step}.ckpt")
    assert rest.losses == whole.losses[step:]


def test_resumed_within_an_epoch_with_a_loader_that_cannot_is_told(tmp_path):
    module, saver = Module(), ModelCheckpoint(tmp_path, every_n_train_steps=3, save_last=True)
    trainer(tmp_path, lora(), saver, enable_checkpointing=True, max_steps=3).fit(module, data(8))
    with pytest.warns(UserWarning, match="ResumableDataLoader goes on"):
        trainer(tmp_path, lora(), max_epochs=1).fit(Module(), data(8), ckpt_path=saver.last_model_path)


class Compiled(Module):
    def build(self) -> None:
        if self.net is None:
            super().build()
            self.net = torch.compile(self.net, backend="eager")


@pytest.mark.parametrize("saved, resumed", [(Compiled, Module), (Module, Compiled), (Compiled, Compiled)])
def test_compiled_or_not_a_checkpoint_is_the_same(tmp_path, saved, resumed):
    saver = ModelCheckpoint(tmp_path, save_last=True)
    first, second, whole = saved(), resumed(), Module()
    torch.manual_seed(5)
    trainer(tmp_path, lora(), saver, enable_checkpointing=True).fit(first, data())
    trainer(tmp_path, lora(), max_epochs=3).fit(second, data(), ckpt_path=tmp_path / "last.ckpt")
    torch.manual_seed(5)
    trainer(tmp_path, lora(), max_epochs=3).fit(whole, data())
    assert first.losses + second.losses == pytest.approx(whole.losses, abs=1e-6)
    loaded = load_from_checkpoint(resumed, tmp_path / "last.ckpt")
    assert all(bool(p.count_nonzero()) for n, p in loaded.named_parameters() if "lora_B" in n)


def test_a_checkpoint_knows_its_base_by_path_names_and_values(tmp_path):
    base = tmp_path / "base.safetensors"
    save_file(Module().net.state_dict(), base)
    kept = ModelTransform(graphpatch.parse(RULES), base_checkpoint=base)
    t = trainer(tmp_path, kept, max_epochs=1)
    t.fit(Module(), data())
    t.save_checkpoint(tmp_path / "a.ckpt")
    held = torch.load(tmp_path / "a.ckpt", weights_only=True)["graphpatch"]["base"]
    assert (held["path"], held["tensors"]) == (str(base), len(list(Module().parameters())))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_from_checkpoint(Module, tmp_path / "a.ckpt")
        # In half precision it is the same base.
        save_file({n: v.bfloat16() for n, v in Module().net.state_dict().items()}, tmp_path / "half.safetensors")
        load_from_checkpoint(Module, tmp_path / "a.ckpt", base=tmp_path / "half.safetensors")

    other = {n: v + 1 for n, v in Module().net.state_dict().items()}
    with pytest.warns(UserWarning, match=r"the base has other values.*it was .*base\.safetensors"):
        load_from_checkpoint(Module, tmp_path / "a.ckpt", base=other)
    with pytest.warns(UserWarning, match="the base has other values"):
        again = ModelTransform(graphpatch.parse(RULES), base_checkpoint=other)
        trainer(tmp_path, again, max_epochs=2).fit(Module(), data(), ckpt_path=tmp_path / "a.ckpt")

    class Deeper(Module):
        def build(self) -> None:
            super().build()
            self.net.more = torch.nn.Linear(2, 2)

    with pytest.raises(graphpatch.Error, match="made on another base: 10 weights, and here are 12") as caught:
        load_from_checkpoint(Deeper, tmp_path / "a.ckpt")
    assert caught.value.code == "GP834"


def test_a_torn_checkpoint_is_told(tmp_path):
    _, path = checkpointed(tmp_path)
    half = tmp_path / "half.ckpt"
    half.write_bytes(Path(path).read_bytes()[:-2000])
    for load in (
        lambda: trainer(tmp_path, lora(), max_epochs=4).fit(Module(), data(), ckpt_path=half),
        lambda: load_from_checkpoint(Module, half),
    ):
        with pytest.raises(graphpatch.Error, match=r"half\.ckpt is no whole checkpoint\n.*last_whole") as caught:
            load()
        assert caught.value.code == "GP833"
