"""What `to_peft` refuses, naming it; how names are chosen; how the files are replaced."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import graphpatch
from graphpatch.checkpoint.peft.naming import ends, patterns
from tests.checkpoint.peft.models import ConvNet, by_peft, llama, logits, trained

FREEZE = "\nfreeze ** except @new"


def config(folder: Path) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


def written(patch: graphpatch.Patch, folder: Path) -> dict:
    graphpatch.to_peft(patch, folder)
    return config(folder)


def refused(code: str, patch: graphpatch.Patch, folder: Path) -> str:
    with pytest.raises(graphpatch.Error) as caught:
        graphpatch.to_peft(patch, folder)
    assert caught.value.code == code and not list(folder.iterdir()), str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("rules", "named"),
    [
        ("patch q_proj with lora patch embed_tokens with scale.output(2.0)", "scale.output"),
        ("patch :*RMSNorm with set(variance_epsilon=0.1)", "set"),
        ("patch q_proj with lora(dora=true) patch v_proj with lora", "DoRA"),
        ("patch embed_tokens with lora patch q_proj with lora(bias=true)", "embed_tokens"),
        ('patch q_proj with lora(adapter="a") patch q_proj with lora(adapter="b")', "two adapters"),
        ("train :*Norm", "LoRA"),
    ],
)
def test_what_peft_cannot_express_is_named(rules, named, tmp_path):
    assert named in refused("GP625", trained(llama(), rules + ("" if "train" in rules else FREEZE)), tmp_path)


def test_convolutions_that_peft_would_misread(tmp_path):
    model = nn.Sequential(nn.Conv1d(4, 4, 3, dilation=2), nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular"))
    assert "dilation" in refused("GP625", trained(model, "patch ^0 with lora" + FREEZE), tmp_path)
    assert "circular" in refused("GP625", trained(model, "patch ^1 with lora" + FREEZE), tmp_path)
    turned = nn.Sequential(nn.ConvTranspose1d(4, 4, 3))
    assert "ConvTranspose1d" in refused("GP625", trained(turned, "patch ^0 with lora" + FREEZE), tmp_path)
    assert "root" in refused("GP625", trained(nn.Linear(3, 3), "patch ^ with lora" + FREEZE), tmp_path)


def test_the_shortest_names_that_name_nothing_else(tmp_path):
    every = written(trained(llama(), "patch {q,v}_proj with lora" + FREEZE), tmp_path)
    assert every["target_modules"] == ["q_proj", "v_proj"] and "exclude_modules" not in every
    some = written(trained(llama(), "patch layers[1].**.{q,v}_proj | lm_head with lora" + FREEZE), tmp_path)
    assert some["target_modules"] == ["1.self_attn.q_proj", "1.self_attn.v_proj", "lm_head"]


def test_a_name_that_is_the_end_of_another(tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.proj = nn.Linear(4, 4)
            self.deep = nn.ModuleDict({"proj": nn.Linear(4, 4)})

        def forward(self, x):
            return self.deep["proj"](self.proj(x)).sin()

    from peft import PeftModel

    x = torch.ones(1, 4)
    for selector in ("^proj", "^deep.proj"):
        model = Twice()
        patch = trained(model, f"patch {selector} with lora" + FREEZE)
        graphpatch.to_peft(patch, tmp_path)
        theirs = PeftModel.from_pretrained(Twice(), str(tmp_path))
        torch.testing.assert_close(theirs(x), model(x))
        again = Twice()
        assert len(graphpatch.load_peft(again, tmp_path).changes) == 1
        torch.testing.assert_close(again(x), model(x))


def test_ends_and_patterns():
    names = ["a.q", "b.q", "b.x.q", "q", "c"]
    assert ends(["a.q", "c"], names) == (["a.q", "c"], [])
    assert ends(["q"], names) == (["q"], ["a.q", "b.q", "b.x.q"])
    assert patterns({"a.q": 1, "b.q": 2, "b.x.q": 2, "c": 3}, 3) == {r"a\.q": 1, r"b\.q": 2, r"x\.q": 2}
    assert patterns({"q": 1, "a.q": 2}, 2) == {"^q": 1}
    assert patterns({"q": 1, "a.q": 1}, 2) == {"q": 1}


def test_saved_modules_whose_names_end_alike(tmp_path):
    """PEFT would take `head` for `lm_head` too; the weight stands in the file by itself then."""

    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.body, self.head, self.lm_head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            x = self.body(x)
            return self.head(x) + self.lm_head(x)

    from peft import PeftModel

    model, x = Heads(), torch.ones(1, 4)
    patch = trained(model, "patch body with lora" + FREEZE + " train head")
    assert written(patch, tmp_path)["modules_to_save"] is None
    torch.testing.assert_close(PeftModel.from_pretrained(Heads(), str(tmp_path))(x), model(x))
    both = Heads()
    assert written(trained(both, "patch body with lora" + FREEZE + " train lm_head"), tmp_path)["modules_to_save"] == ["lm_head"]  # fmt: skip
    torch.testing.assert_close(PeftModel.from_pretrained(Heads(), str(tmp_path))(x), both(x))


def test_tied_weights_that_trained(tmp_path):
    model = llama(tie_word_embeddings=True)
    patch = trained(model, "patch q_proj with lora" + FREEZE + " train embed_tokens")
    assert written(patch, tmp_path)["modules_to_save"] == ["embed_tokens", "lm_head"]
    base = llama(tie_word_embeddings=True)
    torch.testing.assert_close(by_peft(base, tmp_path), logits(model).detach(), atol=1e-5, rtol=1e-5)
    graphpatch.load_peft(base, tmp_path)
    torch.testing.assert_close(logits(base), logits(model))


def test_the_same_patch_gives_the_same_bytes(tmp_path):
    code = """
import sys, warnings, torch, graphpatch
from torch import nn
torch.manual_seed(0)
model = nn.ModuleDict({name: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for name in "abcdefgh"})
rules = "patch ^{a,b,c,d}[0] with lora(rank=4) patch ^{e,f}[0] with lora(rank=2) freeze ** except @new train :LayerNorm"
graphpatch.to_peft(graphpatch.apply(model, graphpatch.parse(rules)), sys.argv[1])
"""
    for number in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": number}
        subprocess.run([sys.executable, "-c", code, str(tmp_path / number)], check=True, env=env, timeout=120)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    patch = trained(llama(), "patch q_proj with lora(rank=4)" + FREEZE)
    graphpatch.to_peft(patch, tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    other = trained(llama(), "patch v_proj with lora(rank=2)" + FREEZE)
    real = os.replace
    for failing in (1, 2):
        calls = []

        def replace(source, target, failing=failing, calls=calls):
            calls.append(target)
            if len(calls) == failing:
                raise OSError(28, "No space left on device")
            return real(source, target)

        monkeypatch.setattr(os, "replace", replace)
        with pytest.raises(graphpatch.Error, match="No space left") as caught:
            graphpatch.to_peft(other, tmp_path)
        assert caught.value.code == "GP604"
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    monkeypatch.setattr(os, "replace", real)
    graphpatch.to_peft(other, tmp_path)
    assert config(tmp_path)["r"] == 2 and len(load_file(tmp_path / "adapter_model.safetensors")) == 6


def test_never_beside_a_model(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(graphpatch.Error) as caught:
        graphpatch.to_peft(trained(llama(), "patch q_proj with lora" + FREEZE), tmp_path)
    assert caught.value.code == "GP629" and [file.name for file in tmp_path.iterdir()] == ["config.json"]


def test_dropouts_that_differ_are_told_of(tmp_path):
    patch = trained(llama(), "patch q_proj with lora(dropout=0.1) patch v_proj with lora" + FREEZE)
    with pytest.warns(UserWarning, match="dropout is written as 0"):
        graphpatch.to_peft(patch, tmp_path)


def test_reverted_or_on_the_meta_device(tmp_path):
    model = llama()
    patch = trained(model, "patch q_proj with lora" + FREEZE)
    patch.revert()
    refused("GP509", patch, tmp_path)
    with torch.device("meta"):
        bare = ConvNet()
    refused("GP605", trained(bare, "patch head with lora" + FREEZE), tmp_path)
