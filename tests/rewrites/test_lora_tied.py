"""One adapter for a tied weight: against the weight with its delta, at both uses, wherever it goes."""

from __future__ import annotations

import copy
import pickle

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import graphpatch

from ..patch.common import randomise, refused, state

RULES = "patch embed | head with lora(rank=2, alpha=4, tied=true)\nfreeze ** except @new"


class Tied(nn.Module):
    def __init__(self, cls: type = nn.Embedding) -> None:
        super().__init__()
        self.embed, self.mid, self.head = nn.Embedding(11, 6, padding_idx=3), nn.Linear(6, 6), nn.Linear(6, 11)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.mid(self.embed(ids)).tanh())


def model() -> nn.Module:
    torch.manual_seed(0)
    return Tied()


IDS = torch.arange(11).view(1, -1)


def patched(text: str = RULES, **options) -> tuple[nn.Module, graphpatch.Patch]:
    made = model()
    patch = graphpatch.apply(made, graphpatch.parse(text), **options)
    randomise(patch)
    return made, patch


def delta(made: nn.Module, tail: str = "", scale: float = 2.0) -> Tensor:
    return scale * (getattr(made.embed, f"lora_B{tail}") @ getattr(made.embed, f"lora_A{tail}")).t()


def with_weight(plain: nn.Module, weight: Tensor, ids: Tensor = IDS) -> Tensor:
    return functional_call(plain, {"embed.weight": weight}, (ids,), tie_weights=True)


def test_both_uses_gain_the_same_and_gradients_are_those_of_the_weight():
    made, patch = patched()
    a, b = made.embed.lora_A, made.embed.lora_B
    assert made.head.lora_A is a and made.head.lora_B is b and len(patch.trainable_parameters()) == 2
    plain = model()
    y, z = made(IDS), with_weight(plain, plain.embed.weight + delta(made))
    torch.testing.assert_close(y, z)
    ids = IDS[IDS != 3].view(1, -1)  # padding has no gradient as an input
    y, z = made(ids), with_weight(plain, plain.embed.weight + delta(made), ids)
    mine, yours = (torch.autograd.grad(out.pow(2).sum(), [a, b]) for out in (y, z))
    for one, other in zip(mine, yours, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_nothing_changes_at_init_and_all_is_undone():
    made = model()
    before, y = state(made), made(IDS)
    patch = graphpatch.apply(made, graphpatch.parse(RULES))
    assert torch.equal(made(IDS), y)
    assert not made.embed.lora_A.any() and 0.5 < made.embed.lora_B.std() < 2
    assert list(patch.adapter_state_dict()) == ["embed.lora_A", "embed.lora_B"]
    assert {"head.lora_A", "head.lora_B"} < set(made.state_dict())
    with patch.disabled():
        assert torch.equal(made(IDS), y)
    patch.revert()
    assert state(made) == before


def test_the_tie_is_in_copies_and_pickles():
    made, _ = patched()
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(other(IDS), made(IDS))
        assert other.head.lora_A is other.embed.lora_A is not made.embed.lora_A
        graphpatch.patches(other)[0].revert()
        assert torch.equal(other(IDS), model()(IDS)) and other.head.weight is other.embed.weight


def test_saved_once_and_loaded(tmp_path):
    made, patch = patched()
    graphpatch.save_adapter(patch, tmp_path)
    other = model()
    loaded = graphpatch.load_adapter(other, tmp_path)
    assert list(loaded.adapter_state_dict()) == ["embed.lora_A", "embed.lora_B"]
    assert other.head.lora_B is other.embed.lora_B and torch.equal(other(IDS), made(IDS))
    with torch.no_grad():
        other.embed.lora_A.zero_()
    graphpatch.load_weights(loaded, patch.adapter_state_dict())
    assert torch.equal(other(IDS), made(IDS))


def test_merged_the_one_weight_changes_once():
    made, patch = patched()
    before, y = made.embed.weight.clone(), made(IDS)
    patch.merge()
    torch.testing.assert_close(made.embed.weight, before + delta(made))
    assert made.head.weight is made.embed.weight
    torch.testing.assert_close(made(IDS), y)
    patch.unmerge()
    assert torch.equal(made.embed.weight, before) and torch.equal(made(IDS), y)


@pytest.mark.parametrize("first", ["head", "embed"])
def test_named_adapters_add_up_whichever_use_stands_first(first):
    class Other(Tied):
        def __init__(self) -> None:
            super().__init__()
            if first == "head":
                self._modules.move_to_end("embed") if hasattr(self._modules, "move_to_end") else None
                self._modules["embed"] = self._modules.pop("embed")

    torch.manual_seed(0)
    made = Other()
    for name in "ab":
        randomise(patch := graphpatch.apply(made, graphpatch.parse(RULES), adapter=name))
        assert all(key.startswith(first) for key in patch.adapter_state_dict())
    made.embed.lora_A_b.data.neg_()
    plain = model()
    wanted = with_weight(plain, plain.embed.weight + delta(made, "_a") + delta(made, "_b"))
    torch.testing.assert_close(made(IDS), wanted)


def test_dropout_and_bf16():
    made, _ = patched(RULES.replace("tied", "dropout=0.5, tied"))
    assert not torch.equal(made(IDS), made(IDS))
    made.eval()
    plain = model()
    torch.testing.assert_close(made(IDS), with_weight(plain, plain.embed.weight + delta(made)))
    half = model().bfloat16()
    patch = graphpatch.apply(half, graphpatch.parse(RULES))
    randomise(patch)
    assert half.head.lora_A.dtype == torch.float32 and half.head.lora_A is half.embed.lora_A
    exact = model().bfloat16().double()
    z = with_weight(exact, exact.embed.weight + delta(half).double())
    assert (half(IDS) - z).abs().max() < 0.05 * z.abs().max()


def test_training_moves_both_uses():
    made, patch = patched()
    optimizer = torch.optim.SGD(patch.trainable_parameters(), lr=0.05)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(made(IDS)[0], IDS[0])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    plain = model()
    torch.testing.assert_close(made(IDS), with_weight(plain, plain.embed.weight + delta(made)))


@pytest.mark.parametrize(
    ("code", "text", "said"),
    [
        ("GP457", "patch embed with lora(tied=true)", "`head` has the weight too"),
        ("GP457", "patch head with lora(tied=true)", "patch ^embed | ^head with lora(tied=true)"),
        ("GP457", "patch embed with lora(rank=2, tied=true)\npatch head with lora(rank=4, tied=true)", "they differ"),
        ("GP458", "patch mid with lora(tied=true)", "no other module has this weight"),
        ("GP424", "patch head with lora(rank=2)", "patch ^head | ^embed with lora(tied=true)"),
        ("GP424", "patch embed with lora(tied=true)\npatch head with lora(rank=2)", "tied"),
        ("GP204", "patch embed | head with lora(tied=true, dora=true)", "does not go together with `dora`"),
    ],
)
def test_one_side_alone_is_refused(code, text, said):
    assert said in refused(code, model(), text + "\nfreeze ** except @new")


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_in_models_of_transformers(family):
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "tie_word_embeddings": True}
    if family == "gpt2":
        made = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, n_positions=16, **sizes)).eval()
        uses = "^transformer.wte | ^lm_head"
    else:
        more = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
        made = LlamaForCausalLM(LlamaConfig(**sizes, **more)).eval()
        uses = "^model.embed_tokens | ^lm_head"
    merged, ids = copy.deepcopy(made), torch.arange(12).view(2, 6)
    patch = graphpatch.apply(
        made, graphpatch.parse(f"patch {uses} with lora(rank=2, tied=true)\nfreeze ** except @new")
    )
    randomise(patch)
    a, b = patch.adapter_state_dict().values()
    merged.get_input_embeddings().weight.data += (b @ a).t()
    torch.testing.assert_close(made(ids).logits, merged(ids).logits)


def test_peft_ties_the_same():
    """Its `ensure_weight_tying`, with the same factors."""
    torch.manual_seed(0)
    config = GPT2Config(n_embd=8, n_layer=1, n_head=2, n_positions=16, vocab_size=20, tie_word_embeddings=True)
    ours = GPT2LMHeadModel(config).eval()
    theirs = copy.deepcopy(ours)
    patch = graphpatch.apply(
        ours, graphpatch.parse("patch ^transformer.wte | ^lm_head with lora(rank=2, tied=true)\nfreeze ** except @new")
    )
    randomise(patch)
    options = {"r": 2, "lora_alpha": 2, "target_modules": ["wte", "lm_head"], "ensure_weight_tying": True}
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(**options)).eval()
    layer = theirs.base_model.model.transformer.wte
    a, b = patch.adapter_state_dict().values()
    layer.lora_embedding_A["default"].data.copy_(a)
    layer.lora_embedding_B["default"].data.copy_(b)
    head = theirs.base_model.model.lm_head
    head.lora_A["default"].weight.data.copy_(b.t())
    head.lora_B["default"].weight.data.copy_(a.t())
    ids = torch.arange(12).view(2, 6)
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits)


def test_what_would_part_them_is_refused(tmp_path):
    _, patch = patched()
    with pytest.raises(graphpatch.Error) as caught:
        graphpatch.to_peft(patch, tmp_path / "portable", profile="portable")
    assert caught.value.code == "GP635" and not (tmp_path / "portable").exists()


def test_on_disk_the_one_weight_changes_once(tmp_path):
    from safetensors.torch import load_file, save_file

    made, patch = patched()
    base = {k: v.clone() for k, v in model().state_dict().items() if k != "head.weight"}
    (tmp_path / "base").mkdir()
    save_file(base, tmp_path / "base" / "model.safetensors")
    graphpatch.save_adapter(patch, tmp_path / "adapter")
    graphpatch.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    torch.testing.assert_close(merged["embed.weight"], base["embed.weight"] + delta(made))
    assert set(merged) == set(base) and torch.equal(merged["mid.weight"], base["mid.weight"])
