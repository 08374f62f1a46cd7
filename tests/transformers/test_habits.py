"""What a Trainer's user does besides: evaluating, generating, pipelines, checkpointed activations, mixed precision."""

from __future__ import annotations

import copy
import pickle
import shutil
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    pipeline,
)

import graphpatch
from graphpatch.transformers import AdapterCheckpoint
from tests.patch.common import randomise, state

from .common import GPT2, KINDS, LORA, arguments, bert, data, llama, losses, patched, trainer

PLAIN = LORA.replace(", dropout=0.1", "")


@pytest.fixture
def tokenizer():
    words = {word: number for number, word in enumerate(["<pad>", "<unk>", *map(chr, range(97, 123))])}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", unk_token="<unk>")


# ── undone, exactly ──


def test_the_model_is_as_it_was_when_the_patch_is_reverted(tmp_path):
    model = llama()
    before = state(model)
    patch = graphpatch.apply(model, graphpatch.parse(LORA))
    patched_state = state(model)
    callback = AdapterCheckpoint(patch)
    trainer(model, tmp_path, callback)
    callback.detach()
    model.config.use_cache = True  # the Trainer's
    assert state(model) == patched_state

    trainer(model, tmp_path, AdapterCheckpoint(patch), max_steps=1).train()
    patch.revert()
    del model._is_accelerate_prepared  # accelerate's
    assert state(model) == before


def test_a_run_that_fails_leaves_nothing_behind(tmp_path):
    class Fails(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    model, patch = patched()
    keys, ignored = list(vars(model)), model._keys_to_ignore_on_save
    callback = AdapterCheckpoint(patch)
    with pytest.raises(KeyboardInterrupt):
        trainer(model, tmp_path, callback, Fails()).train()
    assert model._keys_to_ignore_on_save is ignored
    callback.detach()
    assert set(vars(model)).difference(keys) == {"_is_accelerate_prepared"}  # which is accelerate's
    # And it can be taken up again.
    trainer(model, tmp_path, AdapterCheckpoint(patch)).train(resume_from_checkpoint=True)


def test_detached_the_model_saves_itself_whole(tmp_path):
    model, patch = patched()
    callback = AdapterCheckpoint(patch)
    callback.detach()
    callback.detach()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "config.json").exists() and not (tmp_path / "adapter.json").exists()


def test_copies_save_their_own_adapters(tmp_path):
    model, patch = patched()
    AdapterCheckpoint(patch)
    for make in (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))):
        twin = make(model)
        [handle] = graphpatch.patches(twin)
        randomise(handle)
        twin.save_pretrained(tmp_path)
        loaded = graphpatch.load_adapter(llama(), tmp_path)
        for value, other in zip(loaded.adapter_state_dict().values(), handle.adapter_state_dict().values()):
            assert torch.equal(value, other)
        handle.revert()
        assert type(twin) is type(llama())
    assert graphpatch.patches(model) == [patch]


def test_a_patch_that_is_not_on_the_trained_model_is_refused(tmp_path):
    _, patch = patched()
    with pytest.raises(graphpatch.Error) as caught:
        trainer(llama(), tmp_path, AdapterCheckpoint(patch))
    assert caught.value.code == "GP651"
    with pytest.raises(graphpatch.Error, match="0 patches"):
        trainer(llama(), tmp_path, AdapterCheckpoint())
    model, first = patched()
    second = graphpatch.apply(model, graphpatch.parse(PLAIN), adapter="b")
    with pytest.raises(graphpatch.Error, match="say which"):
        trainer(model, tmp_path, AdapterCheckpoint())
    AdapterCheckpoint(first)
    with pytest.raises(graphpatch.Error, match="another patch"):
        AdapterCheckpoint(second)
    first.revert()
    AdapterCheckpoint(second)


def test_a_model_that_is_made_by_the_trainer(tmp_path):
    def make():
        return patched()[0]

    run = Trainer(model_init=make, args=arguments(tmp_path), train_dataset=data(llama()), callbacks=[AdapterCheckpoint])
    run.train()
    loaded = graphpatch.load_adapter(llama(), tmp_path / "checkpoint-6")
    [patch] = graphpatch.patches(run.model)
    for value, other in zip(loaded.adapter_state_dict().values(), patch.adapter_state_dict().values()):
        assert torch.equal(value, other)


def test_a_model_that_is_none_of_transformers(tmp_path):
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = bert().bert
            self.head = nn.Linear(32, 3)

        def forward(self, input_ids, labels=None):
            logits = self.head(self.encoder(input_ids).pooler_output)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    def made():
        torch.manual_seed(0)
        model = Classifier()
        rules = "patch {query,value} with lora(rank=4)\nfreeze ** except @new\ntrain ^head"
        return model, graphpatch.apply(model, graphpatch.parse(rules))

    def run(model, patch, folder):
        return Trainer(model, arguments(folder), train_dataset=data(bert()), callbacks=[AdapterCheckpoint(patch)])

    model, patch = made()
    whole = run(model, patch, tmp_path)
    whole.train()
    assert (tmp_path / "checkpoint-6" / "model.safetensors").stat().st_size < 20_000
    other, again = made()
    resumed = run(other, again, tmp_path / "again")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert losses(resumed) == losses(whole)
    loaded = Classifier()
    graphpatch.load_adapter(loaded, tmp_path / "checkpoint-6")
    assert torch.equal(loaded.head.weight, model.head.weight)


# ── computing ──


@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_activations_with_a_frozen_base(kind, reentrant, tmp_path):
    def run(**options):
        model, patch = patched(kind, KINDS[kind][1].replace(", dropout=0.1", ""))
        if kind == "bert":
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
        made = trainer(model, tmp_path, AdapterCheckpoint(patch), save_strategy="no", max_steps=3, **options)
        made.train()
        return losses(made), patch.adapter_state_dict()

    kept, expected = run()
    again, found = run(activation_checkpointing=True, activation_checkpointing_kwargs={"use_reentrant": reentrant})
    torch.testing.assert_close(torch.tensor(again), torch.tensor(kept), atol=1e-6, rtol=0)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-4)
        if "lora_B" in name:
            assert value.any(), name


def test_bf16(tmp_path):
    model, patch = patched()
    run = trainer(model, tmp_path, AdapterCheckpoint(patch), bf16=True, max_steps=3)
    run.train()
    exact, other = patched()
    plain = trainer(exact, tmp_path, AdapterCheckpoint(other), max_steps=3)
    plain.train()
    assert all(value.dtype == torch.float32 for value in patch.adapter_state_dict().values())
    torch.testing.assert_close(torch.tensor(losses(run)), torch.tensor(losses(plain)), atol=0.02, rtol=0)
    patch.revert()
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, llama().model.layers[0].mlp.up_proj.weight)


def test_evaluating_predicting_and_smoothed_labels(tmp_path):
    model, patch = patched("bert")
    run = trainer(model, tmp_path, AdapterCheckpoint(patch), label_smoothing_factor=0.1)
    run.train()
    assert run.evaluate()["eval_loss"] > 0
    predicted = run.predict(data(model, 8)).predictions
    batch = torch.stack([row["input_ids"] for row in data(model, 8)])
    torch.testing.assert_close(torch.tensor(predicted), model.eval()(batch).logits.detach())


def test_a_collator_that_pads_and_the_tokenizer_beside(tokenizer, tmp_path):
    model, patch = patched("gpt2")
    texts = [tokenizer(text) for text in ["a b c", "d e", "f g h i", "j k"] * 4]
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    callback = AdapterCheckpoint(patch)
    run = Trainer(
        model,
        arguments(tmp_path, max_steps=2),
        train_dataset=[{"input_ids": text["input_ids"]} for text in texts],
        data_collator=collator,
        processing_class=tokenizer,
        callbacks=[callback],
    )
    run.train()
    assert AutoTokenizer.from_pretrained(tmp_path / "checkpoint-2")("a b")["input_ids"] == [2, 3]


def test_generating_with_a_cache_is_generating_without(tmp_path):
    model, patch = patched("llama", PLAIN)
    AdapterCheckpoint(patch)
    plain = model.eval().generate(torch.tensor([[1, 2, 3]]), max_new_tokens=8, do_sample=False)
    randomise(patch)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(torch.tensor([[1, 2, 3]]), use_cache=True, **options)
    assert torch.equal(cached, model.generate(torch.tensor([[1, 2, 3]]), use_cache=False, **options))
    assert not torch.equal(cached, plain)


def test_pipelines(tokenizer):
    model, patch = patched("gpt2", GPT2.replace(", dropout=0.1", ""))
    AdapterCheckpoint(patch)
    randomise(patch)
    model.eval()  # GPT-2's own dropout
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "return_tensors": True}
    [[written]] = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")(["a b c"], **options)
    ids = tokenizer("a b c", return_tensors="pt")["input_ids"]
    assert (
        written["generated_token_ids"]
        == model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)[0].tolist()
    )

    model, patch = patched("bert")
    AdapterCheckpoint(patch)
    randomise(patch)
    model.eval()
    [answer] = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")("a b c")
    assert answer["score"] == pytest.approx(model(ids).logits.softmax(-1).max().item(), abs=1e-6)
    features = pipeline("feature-extraction", model=model.bert, tokenizer=tokenizer, device="cpu")("a b c")
    torch.testing.assert_close(torch.tensor(features), model.bert(ids).last_hidden_state.detach())


def test_what_is_pushed_to_the_hub_is_an_adapter(tmp_path, monkeypatch):
    pushed = []

    class Hub:
        def create_repo(self, name, **options):
            return SimpleNamespace(repo_id=name)

        def upload_folder(self, folder_path, **options):
            pushed.append(tmp_path / "pushed" / str(len(pushed)))
            shutil.copytree(folder_path, pushed[-1], ignore=shutil.ignore_patterns("checkpoint-*"))
            return SimpleNamespace(done=lambda: True, result=lambda: None)

    monkeypatch.setattr("transformers.trainer.hf_api", Hub)
    model, patch = patched()
    run = trainer(
        model, tmp_path / "run", AdapterCheckpoint(patch), push_to_hub=True, hub_model_id="me/it", max_steps=2
    )
    run.train()
    assert len(pushed) == 1
    graphpatch.load_adapter(llama(), pushed[0])
    assert not (pushed[0] / "config.json").exists()


def test_a_sharded_model_is_refused(tmp_path):
    model, patch = patched()
    run = trainer(model, tmp_path, AdapterCheckpoint(patch))
    model.lm_head.weight.ds_id = 0  # by which DeepSpeed marks what ZeRO stage 3 has taken away
    with pytest.raises(graphpatch.Error, match="ZeRO stage 3") as caught:
        run.train()
    assert caught.value.code == "GP654"
