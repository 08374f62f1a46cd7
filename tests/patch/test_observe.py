"""Ops that start from data: EVA against PEFT's and against a plain decomposition, and what is refused."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import graphpatch
from graphpatch.rewrites.eva import Directions
from tests.toys import lm

RULES = 'patch **.{q,k,v}_proj with lora(rank=4, init="eva")\nfreeze ** except @new'


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()


def alike(a: Tensor, b: Tensor) -> float:
    """The cosine of the largest angle between what two sets of orthonormal rows span."""
    return torch.linalg.svdvals(a.float() @ b.float().T).min().item()


def principal(rows: Tensor, rank: int) -> Tensor:
    return torch.linalg.svd(rows.double() - rows.double().mean(0), full_matrices=False)[2][:rank]


@pytest.mark.parametrize("module", [nn.Linear(24, 5), nn.Linear(24, 5, bias=False), Conv1D(5, 24)], ids=repr)
def test_a_holds_the_principal_directions_of_all_inputs(module):
    torch.manual_seed(0)
    spread = 0.7 ** torch.arange(24) * torch.randn(24, 24)
    batches = [torch.randn(3, 50, 24) @ spread + 2 for _ in range(12)]
    model, x = nn.Sequential(module), torch.randn(2, 24)
    before = model(x)
    patch = graphpatch.apply(
        model, graphpatch.parse('patch ^0 with lora(rank=4, init="eva")\nfreeze ** except @new'), batches=batches
    )
    assert torch.equal(model(x), before)
    a = module.lora_A.detach()
    torch.testing.assert_close(a @ a.T, torch.eye(4), atol=1e-5, rtol=0)
    assert alike(a, principal(torch.cat(batches).flatten(0, 1), 4)) > 0.98
    patch.revert()
    assert not hasattr(module, "lora_A")


def test_taken_in_by_parts_it_is_the_decomposition_of_the_whole():
    torch.manual_seed(0)
    rows = torch.randn(3000, 40) * 0.5 ** torch.arange(40) + torch.arange(40)
    observer, state = Directions(6), None
    for some in rows.split([700, 1, 0, 4, 1200, 1095]):
        state = observer.see(state, some)
    _, values, directions = torch.linalg.svd(rows.double() - rows.double().mean(0), full_matrices=False)
    torch.testing.assert_close(state.mean, rows.double().mean(0))
    torch.testing.assert_close(state.values[:6], values[:6], rtol=1e-4, atol=0)
    assert ((state.directions[:6] * directions[:6]).sum(1).abs() > 0.9999).all()
    assert state.number == 3000 and len(state.directions) == 12


def test_as_peft_finds_them_padding_left_out():
    torch.manual_seed(1)
    batches = []
    for _ in range(6):
        ids, mask = torch.randint(64, (8, 12)), torch.ones(8, 12, dtype=torch.long)
        mask[:, 9:] = 0
        ids[mask == 0] = 0  # were they not left out, all directions would be of this token
        batches.append({"input_ids": ids, "attention_mask": mask})
    ours = llama()
    graphpatch.apply(ours, graphpatch.parse(RULES), batches=batches)
    config = peft.LoraConfig(
        target_modules=["q_proj", "k_proj", "v_proj"], r=4, init_lora_weights="eva", eva_config=peft.EvaConfig(rho=1.0)
    )
    theirs = peft.get_peft_model(llama(), config)
    peft.initialize_lora_eva_weights(theirs, batches, show_progress_bar=False)
    base, inputs = llama(), {}
    for name, module in base.named_modules():
        if name.endswith("q_proj"):
            module.register_forward_pre_hook(lambda _, args, name=name: inputs.setdefault(name, []).append(args[0]))
    with torch.no_grad():
        for batch in batches:
            base(**batch)
    kept = torch.cat([b["attention_mask"] for b in batches]).bool()
    for name, found in inputs.items():
        rows = torch.cat(found)[kept]
        rows = rows - rows.mean(0)
        mine = ours.get_submodule(name).lora_A
        yours = theirs.base_model.model.get_submodule(name).lora_A["default"].weight
        explained = [(rows @ a.T).pow(2).sum() / rows.pow(2).sum() for a in (mine, yours, principal(rows, 4).float())]
        # As much of the variance as PEFT's, and all but what an exact decomposition explains.
        assert explained[0] > 0.99 * explained[1] and explained[0] > 0.97 * explained[2]
        layer = ours.get_submodule(name.removesuffix(".q_proj"))
        assert torch.equal(layer.q_proj.lora_A, layer.k_proj.lora_A)
        assert torch.equal(layer.q_proj.lora_A, layer.v_proj.lora_A)


def test_what_q_k_and_v_share_is_looked_at_once(monkeypatch):
    seen = []
    see = Directions.see
    monkeypatch.setattr(Directions, "see", lambda self, state, rows: seen.append(1) or see(self, state, rows))
    model = lm(layers=3)
    graphpatch.apply(model, graphpatch.parse(RULES), batches=[torch.randint(32, (2, 30))])
    assert len(seen) == 3


def test_it_stops_when_all_is_settled():
    taken = []

    def batches():
        torch.manual_seed(0)
        for at in range(1000):
            taken.append(at)
            yield (torch.randn(200, 16) * 0.5 ** torch.arange(16),)

    model = nn.Sequential(nn.Linear(16, 4))
    graphpatch.apply(model, graphpatch.parse('patch ^0 with lora(rank=3, init="eva")\nfreeze **'), batches=batches())
    assert 2 <= len(taken) < 50


def test_the_model_is_left_as_it_was():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 2)).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    rules = graphpatch.parse('patch :Linear with lora(rank=2, init="eva")\nfreeze ** except @new')
    patch = rules.plan(model).apply(model, batches=[torch.randn(30, 8)])
    patch.revert()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training and model[2].training and not any(m._forward_pre_hooks for m in model.modules())


def test_a_saved_adapter_needs_no_batches(tmp_path):
    model, x = lm().eval(), torch.randint(32, (2, 9))
    patch = graphpatch.apply(model, graphpatch.parse(RULES), batches=[x])
    graphpatch.save_adapter(patch, tmp_path / "eva")
    other = lm().eval()
    graphpatch.load_adapter(other, tmp_path / "eva")
    assert torch.equal(other(x), model(x))
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in model.state_dict().items())


def test_on_the_meta_device_there_is_nothing_to_look_at():
    model = lm().to("meta")
    graphpatch.apply(model, graphpatch.parse(RULES))
    assert model.model.layers[0].self_attn.q_proj.lora_A.is_meta


class Unreached(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.used(x)


FINE = [torch.randn(20, 6)]


@pytest.mark.parametrize(
    ("rules", "batches", "code", "says"),
    [
        ('patch **.used with lora(rank=2, init="eva")', None, "GP535", "there are no batches"),
        ("patch **.used with lora(rank=2)", FINE, "GP536", "no op of this plan looks at batches"),
        ('patch **.used with lora(rank=2, init="eva")', torch.randn(2, 6), "GP536", "one Tensor"),
        ('patch **.used with lora(rank=2, init="eva")', {"x": FINE[0]}, "GP536", "one dict"),
        ('patch **.used with lora(rank=2, init="eva")', 3, "GP536", "one int"),
        ('patch **.used with lora(rank=2, init="eva")', [torch.randn(2, 7)], "GP537", "fails on batch 0"),
        ('patch **.used with lora(rank=2, init="eva")', [{"y": FINE[0]}], "GP537", "unexpected keyword"),
        ('patch **.used with lora(rank=2, init="eva")', [], "GP538", "no input reached it"),
        ('patch **.unused with lora(rank=2, init="eva")', FINE, "GP538", "`unused`: no input reached it"),
        ('patch **.used with lora(rank=4, init="eva")', [torch.randn(3, 6)], "GP538", "2 directions"),
        ('patch **.used with lora(rank=2, init="eva")', [torch.full((9, 6), torch.nan)], "GP538", "not finite"),
        ('patch **.used with lora(rank=2, init="eva")', [torch.ones(9, 6)], "GP538", "0 directions"),
    ],
)
def test_what_cannot_be_learned_is_said_before_anything_changes(rules, batches, code, says):
    model = Unreached()
    with pytest.raises(graphpatch.ApplyError, match=says) as caught:
        graphpatch.apply(model, graphpatch.parse(rules + "\nfreeze ** except @new"), batches=batches)
    assert caught.value.code == code
    assert len(list(model.parameters())) == 4 and not graphpatch.patches(model) and type(model.used) is nn.Linear
