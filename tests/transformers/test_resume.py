"""Checkpoints hold the adapter alone, and a run that is taken up again goes on as if it had never stopped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import graphpatch
from graphpatch.transformers import AdapterCheckpoint
from tests.patch.common import state

from .common import KINDS, LORA, data, llama, losses, patched, trained, trainer


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One whole run of each kind."""
    return {kind: trained(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


def folder(run, step: int) -> Path:
    return Path(run.args.output_dir, f"checkpoint-{step}")


def elsewhere(kind: str, text: str | None = None):
    """As in another process: the same base, and other factors."""
    model, patch = patched(kind, text)
    with torch.no_grad():
        for tensor in patch.adapter_state_dict().values():
            tensor.normal_()
    torch.manual_seed(99)
    return model, patch


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(kind, runs, tmp_path):
    model, _, whole = runs[kind]
    other, patch = elsewhere(kind)
    resumed = trainer(other, tmp_path, AdapterCheckpoint(patch))
    resumed.train(resume_from_checkpoint=str(folder(whole, 4)))
    assert losses(resumed) == losses(whole)
    assert len(set(losses(whole))) == 6
    for (name, value), again in zip(model.state_dict().items(), other.state_dict().values()):
        assert torch.equal(value, again), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_holds_what_trains_and_nothing_else(kind, runs):
    model, patch, run = runs[kind]
    files = {file.name for file in folder(run, 6).iterdir()}
    weights = {name for name in files if name.endswith((".safetensors", ".json", ".bin"))}
    assert weights == {
        "adapter.json",
        "adapter.safetensors",
        "model.safetensors",
        "trainer_state.json",
        "training_args.bin",
    }
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trains > patch.adapter_state_dict().keys() if kind == "bert" else trains == patch.adapter_state_dict().keys()
    assert load_file(folder(run, 6) / "model.safetensors").keys() - {"graphpatch.changes"} == trains
    assert load_file(folder(run, 6) / "adapter.safetensors").keys() == trains


@pytest.mark.parametrize("kind", KINDS)
def test_load_adapter_reads_a_checkpoint_and_what_save_model_wrote(kind, runs, tmp_path):
    model, _, run = runs[kind]
    run.save_model(str(tmp_path / "saved"))
    batch = {"input_ids": torch.stack([row["input_ids"] for row in data(model, 4)])}
    expected = model.eval()(**batch).logits
    for source in (folder(run, 6), tmp_path / "saved"):
        base = KINDS[kind][0]().eval()
        graphpatch.load_adapter(base, source)
        assert torch.equal(base(**batch).logits, expected)


def test_resuming_says_nothing_of_the_base(runs, tmp_path, caplog):
    other, patch = elsewhere("llama")
    with caplog.at_level("WARNING"):
        trainer(other, tmp_path, AdapterCheckpoint(patch)).train(
            resume_from_checkpoint=str(folder(runs["llama"][2], 4))
        )
    assert "missing keys" not in caplog.text and "unexpected keys" not in caplog.text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (LORA.replace("alpha=8", "alpha=16"), "alpha=16"),  # the same names and shapes
        (LORA.replace("rank=4", "rank=2"), "rank=2"),
        (LORA.replace(":Linear", "{q,v}_proj").replace("except ^lm_head", ""), "{q,v}_proj"),
        (LORA.replace("lora(", 'lora(adapter="other", '), "adapter=other"),
    ],
)
def test_a_checkpoint_made_with_other_rules_is_refused_with_the_difference(text, said, runs, tmp_path):
    model, patch = elsewhere("llama", text)
    run = trainer(model, tmp_path, AdapterCheckpoint(patch))
    before = state(model)
    with pytest.raises(graphpatch.Error) as caught:
        run.train(resume_from_checkpoint=str(folder(runs["llama"][2], 4)))
    assert caught.value.code == "GP652"
    assert said in str(caught.value) and "- lora(rank=4, alpha=8" in str(caught.value)
    assert state(model) == before


def test_another_number_of_trained_weights_is_refused(runs, tmp_path):
    model, patch = elsewhere("llama")
    model.model.norm.weight.requires_grad_(True)
    run = trainer(model, tmp_path, AdapterCheckpoint(patch))
    before = state(model)
    with pytest.raises(graphpatch.Error) as caught:
        run.train(resume_from_checkpoint=str(folder(runs["llama"][2], 4)))
    assert caught.value.code == "GP614" and "model.norm.weight" in str(caught.value)
    assert state(model) == before


def test_two_patches_that_train_are_both_in_the_checkpoint(tmp_path):
    def both():
        model = llama()
        graphpatch.apply(model, graphpatch.parse(LORA))
        second = graphpatch.apply(
            model, graphpatch.parse("patch q_proj with lora(rank=2)\nfreeze **:Embedding"), adapter="b"
        )
        return model, second

    model, patch = both()
    whole = trainer(model, tmp_path, AdapterCheckpoint(patch))
    whole.train()
    other, patch = both()
    resumed = trainer(other, tmp_path / "again", AdapterCheckpoint(patch))
    resumed.train(resume_from_checkpoint=str(folder(whole, 4)))
    assert losses(resumed) == losses(whole)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path):
    model, patch = patched()
    run = trainer(
        model,
        tmp_path,
        AdapterCheckpoint(patch),
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        save_total_limit=1,
        metric_for_best_model="loss",
        greater_is_better=True,  # the worst, so that it is not the last
    )
    run.train()
    evaluations = {e["step"]: e["eval_loss"] for e in run.state.log_history if "eval_loss" in e}
    best = max(evaluations, key=evaluations.__getitem__)
    assert best != 6 and [file.name for file in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{best}"]
    assert run.evaluate()["eval_loss"] == evaluations[best]
    kept = load_file(tmp_path / f"checkpoint-{best}" / "adapter.safetensors")
    assert all(torch.equal(kept[name], value) for name, value in patch.adapter_state_dict().items())


@pytest.mark.parametrize(
    "options", [{"save_only_model": True}, {"save_strategy": "epoch", "num_train_epochs": 1, "max_steps": -1}]
)
def test_other_ways_to_save(options, tmp_path):
    model, patch = patched()
    run = trainer(model, tmp_path, AdapterCheckpoint(patch), **options)
    run.train()
    last = folder(run, run.state.global_step)
    assert (last / "optimizer.pt").exists() is not ("save_only_model" in options)
    base = llama()
    twin = graphpatch.load_adapter(base, last)
    assert all(
        torch.equal(a, b) for a, b in zip(twin.adapter_state_dict().values(), patch.adapter_state_dict().values())
    )


def test_a_damaged_checkpoint_is_refused(runs, tmp_path):
    from safetensors.torch import save_file

    saved = load_file(folder(runs["llama"][2], 4) / "model.safetensors")
    for name, broken in {
        "rules": {**saved, "graphpatch.changes": torch.zeros(5, dtype=torch.uint8)},
        "missing": {k: v for k, v in saved.items() if k != "model.layers.0.mlp.up_proj.lora_A"},
        "shape": {**saved, "model.layers.0.mlp.up_proj.lora_A": torch.zeros(3, 3)},
    }.items():
        model, patch = elsewhere("llama")
        run = trainer(model, tmp_path, AdapterCheckpoint(patch))
        path = tmp_path / name
        path.mkdir()
        save_file(broken, path / "model.safetensors")
        before = state(model)
        with pytest.raises(graphpatch.Error) as caught:
            run.train(resume_from_checkpoint=str(path))
        assert caught.value.code in ("GP652", "GP614", "GP615")
        assert state(model) == before
