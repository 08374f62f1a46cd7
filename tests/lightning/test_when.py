"""The transform happens once, at the right moment, in every way a module can be built and a trainer be used."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import graphpatch
from graphpatch.lightning import LoRA, ModelTransform, checks

from .common import Module, data, factors, trainer

RULES = "patch linear_qkv | linear_proj with lora(rank=2)\nfreeze ** except @new"
NAMES = [f"net.layers.{i}.{m}.lora_{ab}" for i in (0, 1) for m in ("linear_qkv", "linear_proj") for ab in "AB"]


@pytest.mark.parametrize("built", ["init", "setup", "configure_model"])
def test_nemo_usage_trains_the_adapter_alone(tmp_path, built):
    lora = LoRA(target_modules=["linear_qkv", "linear_proj"], dim=32, dropout=0.0)
    module = Module(lora, built)
    assert not factors(module)
    t = trainer(tmp_path, lora)
    t.fit(module, data())
    assert factors(module) == NAMES
    assert [p.shape[0] for n, p in module.named_parameters() if n.endswith("qkv.lora_A")] == [32, 32]
    fresh = Module(built="init")
    for name, tensor in fresh.net.named_parameters():
        assert torch.equal(tensor, dict(module.net.named_parameters())[name])  # the base did not train
    assert all(p.count_nonzero() for n, p in module.named_parameters() if "lora_B" in n)
    assert sum(len(g["params"]) for g in t.optimizers[0].param_groups) == 8


def test_once_over_validate_fit_test_predict_fit(tmp_path):
    module = Module(built="configure_model")
    callback = ModelTransform(graphpatch.parse(RULES))
    for call in ("validate", "fit", "test", "predict", "fit", "validate"):
        getattr(trainer(tmp_path, callback), call)(module, data())
        assert factors(module) == NAMES and len(graphpatch.patches(module)) == 1
    assert module.configure_model.__func__ is Module.configure_model


def test_test_and_predict_run_the_transformed_model(tmp_path):
    def shift(model):
        graphpatch.apply(model, graphpatch.parse("patch ^net.norm with scale.output(3)"))

    plain, module = Module(), Module(shift)
    predicted = trainer(tmp_path, ModelTransform()).predict(module, data())
    expected = trainer(tmp_path).predict(plain, data())
    assert all(torch.allclose(a, 3 * b) for a, b in zip(predicted, expected))


def test_a_file_a_packaged_name_a_rule_set_and_a_function(tmp_path):
    file = tmp_path / "mine.rules"
    file.write_text("param rank: int\n" + RULES.replace("rank=2", "rank=$rank"))
    transforms = [
        ModelTransform(str(file), params={"rank": 2}),
        ModelTransform(file, {"rank": 2}),
        ModelTransform(graphpatch.load(file, rank=2)),
        ModelTransform(lambda model: graphpatch.apply(model, file, rank=2)),
    ]
    losses = []
    for transform in transforms:
        module = Module()
        torch.manual_seed(3)
        trainer(tmp_path, transform).fit(module, data())
        assert factors(module) == NAMES
        losses.append(module.losses)
    assert all(one == losses[0] for one in losses)


def test_the_same_transform_twice_acts_once_and_two_different_ones_are_refused(tmp_path):
    module = Module(graphpatch.parse(RULES))
    trainer(tmp_path, ModelTransform(graphpatch.parse(RULES))).fit(module, data())
    assert len(graphpatch.patches(module)) == 1
    with pytest.raises(graphpatch.Error, match="two different transforms") as caught:
        trainer(tmp_path, LoRA(["linear_qkv"], dim=4)).fit(Module(LoRA(["linear_qkv"], dim=8)), data())
    assert caught.value.code == "GP803"


def test_two_adapters_are_two_callbacks(tmp_path):
    module = Module()
    t = trainer(tmp_path, LoRA(["linear_qkv"], dim=2, adapter="a"), LoRA(["linear_qkv"], dim=3, adapter="b"))
    t.fit(module, data())
    assert {n.rpartition(".")[2] for n in factors(module)} == {"lora_A_a", "lora_B_a", "lora_A_b", "lora_B_b"}
    with pytest.raises(graphpatch.Error, match="GP808"):
        trainer(tmp_path, LoRA(["linear_qkv"]), LoRA(["linear_proj"])).fit(Module(), data())


def test_copies_pickles_and_other_trainers_go_on(tmp_path):
    module = Module(LoRA(["linear_qkv", "linear_proj"], dim=2), "configure_model")
    trainer(tmp_path, module.model_transform).fit(module, data())
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        trainer(tmp_path, twin.model_transform).fit(twin, data())
        assert factors(twin) == NAMES and len(graphpatch.patches(twin)) == 1
        assert twin.net is not module.net


def test_called_in_configure_model_the_callback_only_verifies(tmp_path):
    class Early(Module):
        def configure_model(self):
            self.build()
            self.model_transform(self.net)

    # PiSSA's first factors are buffers, which no optimizer and no `requires_grad` tells of.
    rules = graphpatch.parse('patch linear_qkv with lora(rank=2, init="pissa")\nfreeze ** except @new')
    transform = ModelTransform(rules)
    module = Early(transform, "configure_model")
    t = trainer(tmp_path, transform)
    t.fit(module, data())
    assert len(graphpatch.patches(module)) == 1 and len(factors(module)) == 4
    t.save_checkpoint(tmp_path / "a.ckpt")
    held = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert len([name for name in held if "lora_" in name]) == 8


def test_what_is_wrong_is_said_before_anything_is_built(tmp_path):
    for transform, module, code in (
        (ModelTransform(), Module(), "GP801"),
        (ModelTransform(graphpatch.parse(RULES), params={"rank": 3}), Module(), "GP802"),
        (ModelTransform(lambda model: Module()), Module(), "GP804"),
        (LoRA(["nowhere"]), Module(), "GP401"),
        (ModelTransform("patch linear_qkv with lora(rank=2)"), Module(), "GP211"),
        (ModelTransform("freeze"), Module(), "GP811"),
    ):
        with pytest.raises(graphpatch.Error) as caught:
            trainer(tmp_path, transform).fit(module, data())
        assert caught.value.code == code and not factors(module)


@pytest.mark.parametrize(
    ("values", "code"),
    [
        ({"dim": 0}, "GP204"),
        ({"dropout": 2}, "GP204"),
        ({"target_modules": []}, "GP819"),
        ({"target_modules": [3]}, "GP819"),
    ],
)
def test_lora_says_what_is_wrong_where_it_is_made(values, code):
    with pytest.raises(graphpatch.Error) as caught:
        LoRA(**values)
    assert caught.value.code == code


def test_an_optimizer_made_before_the_transform(tmp_path):
    class Early(Module):
        def __init__(self):
            super().__init__()
            self.optimizer = torch.optim.Adam(self.parameters())

        def configure_optimizers(self):
            return self.optimizer

    with pytest.raises(graphpatch.Error, match="holds none of the 4 parameters that train"):
        trainer(tmp_path, LoRA(["linear_qkv"])).fit(Early(), data())


def test_hyperparameters_that_swallow_the_transform(tmp_path):
    class Saves(Module):
        def __init__(self, model_transform=None):
            super().__init__(model_transform)
            self.save_hyperparameters()

    lora = LoRA(["linear_qkv"])
    with pytest.raises(graphpatch.Error, match=r'save_hyperparameters\(ignore=\["model_transform"\]\)'):
        trainer(tmp_path, lora).fit(Saves(lora), data())


def test_deepspeed_is_refused_by_its_name():
    class DeepSpeedStrategy:
        pass

    class Trainer:
        strategy = DeepSpeedStrategy()

    with pytest.raises(graphpatch.Error, match="GP815"):
        checks.refuse_strategy(Trainer())
