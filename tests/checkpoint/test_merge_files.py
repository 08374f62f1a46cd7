"""Merging on disk: the same bits as merging the whole model, whatever the files are, and nothing half done."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import graphpatch
from graphpatch.checkpoint.merging import write as writing
from graphpatch.cli.main import main
from tests.checkpoint.common import LORA, NORMS
from tests.patch.common import patch, randomise
from tests.toys import LM, lm

posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
TWO = 'patch q_proj with lora(rank=4, adapter="a") then lora(rank=2, adapter="b")\nfreeze ** except @new'


def prepared(folder: Path, text: str = LORA, model: nn.Module | None = None, dtype=torch.bfloat16) -> nn.Module:
    """`base/model.safetensors` and `adapter/` in the folder; returns the model, merged."""
    model = (lm() if model is None else model).to(dtype)
    (folder / "base").mkdir(parents=True)
    save(model.state_dict(), folder / "base" / "model.safetensors")
    made = patch(model, text)
    randomise(made)
    graphpatch.save_adapter(made, folder / "adapter")
    made.bake()
    return model


def save(tensors: dict[str, torch.Tensor], file: Path) -> None:
    save_file({name: t.clone().contiguous() for name, t in tensors.items()}, file, metadata={"format": "pt"})


def merge(folder: Path) -> dict[str, torch.Tensor]:
    graphpatch.merge_checkpoint(folder / "base", folder / "adapter", folder / "out")
    return read(folder / "out")


def read(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def same(found: dict[str, torch.Tensor], model: nn.Module) -> bool:
    want = model.state_dict()
    return found.keys() == want.keys() and all(
        found[name].dtype == want[name].dtype and torch.equal(found[name], want[name]) for name in want
    )


def refused(code: str, folder: Path, *said: str, base="base", adapter="adapter", out="out") -> str:
    before = sorted(folder.rglob("*"))
    with pytest.raises(graphpatch.Error) as caught:
        graphpatch.merge_checkpoint(folder / base, folder / adapter, folder / out)
    assert caught.value.code == code, str(caught.value)
    assert sorted(folder.rglob("*")) == before
    for word in said:
        assert word in str(caught.value)
    return str(caught.value)


# ── the same as in memory ──


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_tensor_is_that_of_the_merged_model(tmp_path, dtype):
    assert same(merge_of(tmp_path, dtype=dtype), prepared(tmp_path / "again", dtype=dtype))


def merge_of(folder: Path, *args, **kwargs) -> dict[str, torch.Tensor]:
    prepared(folder, *args, **kwargs)
    return merge(folder)


@pytest.mark.parametrize(
    "text",
    [
        NORMS,
        TWO,
        "patch embed_tokens | lm_head with lora(rank=3, alpha=1)\nfreeze ** except @new",
        "patch :Linear with lora(rank=4, dora=true, use_rslora=true)\nfreeze ** except @new",
        'patch :Linear with lora(rank=2, init="pissa")\nfreeze ** except @new',
        "patch up_proj with lora(rank=2, bias=true)\nfreeze ** except @new",
        "patch q_proj with lora(rank=2)\ntrain q_proj\nfreeze ** except @new | q_proj",
    ],
)
def test_whatever_the_rules_are(tmp_path, text):
    merged = prepared(tmp_path, text)
    assert same(merge(tmp_path), merged)


def test_convolutions_and_running_statistics(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.fc = nn.Conv2d(4, 8, 3, groups=2), nn.BatchNorm2d(8), nn.Linear(8, 2)

    torch.manual_seed(0)
    base = Net()
    (tmp_path / "base").mkdir()
    save(base.state_dict(), tmp_path / "base" / "model.safetensors")
    made = patch(base, "patch :Conv2d | :Linear with lora(rank=2)\nfreeze ** except @new")
    randomise(made)
    base.norm.running_mean += 3
    base.norm.num_batches_tracked += 7
    graphpatch.save_adapter(made, tmp_path / "adapter")
    made.bake()
    assert same(merge(tmp_path), base)


def test_blocks_of_large_weights_are_the_whole_matrix(tmp_path):
    torch.manual_seed(0)
    merged = prepared(tmp_path, model=LM(layers=1, hidden=600, vocabulary=1500))
    assert same(merge(tmp_path), merged)


def test_sharded_with_an_index_and_other_files(tmp_path):
    merged = prepared(tmp_path)
    base = tmp_path / "base"
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {f"model-0000{i + 1}-of-00003.safetensors": names[i::3] for i in range(3)}
    for file, held in shards.items():
        save({name: tensors[name] for name in held}, base / file)
    index = {"metadata": {"total_size": 1}, "weight_map": {n: f for f, held in shards.items() for n in held}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    (base / "tokenizer.json").write_text("{}")
    (base / "chat" / "templates").mkdir(parents=True)
    (base / "chat" / "templates" / "a.jinja").write_text("a")
    os.symlink(base / "tokenizer.json", base / "linked.json")
    for stale in ("pytorch_model.bin", "consolidated.safetensors", "model.fp16.safetensors", "x.gguf", ".cache/y"):
        (base / stale).parent.mkdir(exist_ok=True)
        (base / stale).write_text("old weights")
    assert same(merge(tmp_path), merged)
    files = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert files == sorted(
        [*shards, "chat/templates/a.jinja", "linked.json", "model.safetensors.index.json", "tokenizer.json"]
    )
    assert (tmp_path / "out" / "model.safetensors.index.json").read_text() == json.dumps(index)
    assert not (tmp_path / "out" / "linked.json").is_symlink()
    for shard in shards:
        one, other = ((folder / shard).read_bytes() for folder in (base, tmp_path / "out"))
        length = 8 + int.from_bytes(one[:8], "little")
        assert one[:length] == other[:length] and len(one) == len(other)


def test_a_single_file_becomes_a_single_file(tmp_path):
    merged = prepared(tmp_path)
    file = tmp_path / "base" / "model.safetensors"
    graphpatch.merge_checkpoint(file, tmp_path / "adapter", tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    assert same(found, merged)
    refused("GP646", tmp_path, "single file", base="base/model.safetensors", out="elsewhere")


def test_tied_weights_in_the_files_once_or_twice(tmp_path):
    text = "patch q_proj with lora(rank=4)\ntrain embed_tokens\nfreeze ** except @new | embed_tokens"
    for twice in (False, True):
        folder = tmp_path / str(twice)
        merged = prepared(folder, text, lm(tied=True))
        base = load_file(folder / "base" / "model.safetensors")
        if not twice:
            base.pop("lm_head.weight")
        save(base, folder / "base" / "model.safetensors")
        found, want = merge(folder), merged.state_dict()
        assert found.keys() == base.keys() and all(torch.equal(found[n], want[n]) for n in found)


@pytest.mark.parametrize("change", [lambda n: n.removeprefix("model."), lambda n: "wrapped." + n])
def test_a_prefix_more_or_less_is_the_same_model(tmp_path, change):
    text = "patch ^model.**:Linear with lora(rank=4)\nfreeze ** except @new"
    merged = prepared(tmp_path, text)
    base = load_file(tmp_path / "base" / "model.safetensors")
    save({change(name): t for name, t in base.items()}, tmp_path / "base" / "model.safetensors")
    found, want = merge(tmp_path), merged.state_dict()
    assert all(torch.equal(found[change(name)], want[name]) for name in want)


def test_unmerging_reads_such_files_too(tmp_path):
    prepared(tmp_path, dtype=torch.float32)
    model = lm()
    patched = graphpatch.load_adapter(model, tmp_path / "adapter")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    patched.merge(keep=False)
    patched.unmerge(base=tmp_path / "base")
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    patched.merge(keep=False)
    with pytest.raises(graphpatch.Error) as caught:
        patched.unmerge(base=tmp_path / "adapter")
    assert caught.value.code == "GP642" and patched.merged


# ── what is refused ──


def test_a_place_that_is_taken_is_not_touched(tmp_path):
    prepared(tmp_path)
    for make in (lambda p: p.mkdir(), lambda p: p.write_text("mine"), lambda p: p.symlink_to("nowhere")):
        make(tmp_path / "out")
        refused("GP646", tmp_path, "there already")
        shutil.rmtree(tmp_path / "out") if (tmp_path / "out").is_dir() else (tmp_path / "out").unlink()


def test_another_base_is_named(tmp_path):
    prepared(tmp_path)
    file = tmp_path / "base" / "model.safetensors"
    base = load_file(file)
    for change, code, word in (
        (lambda t: t.pop("model.layers.2.mlp.up_proj.weight"), "GP642", "model.layers.2.mlp.up_proj.weight   missing"),
        (lambda t: t.update({"lm_head.weight": torch.zeros(33, 16)}), "GP643", "[33, 16]"),
        (lambda t: t.update({"lm_head.weight": torch.zeros(32, 16, dtype=torch.int8)}), "GP643", "quantised"),
        (lambda t: t.update({"lm_head.weight": torch.zeros(32, 16).to(torch.float8_e4m3fn)}), "GP643", "F8_E4M3"),
        (lambda t: t["lm_head.weight"][3].fill_(torch.inf), "GP647", "lm_head.weight"),
    ):
        other = {name: t.clone() for name, t in base.items()}
        change(other)
        save(other, file)
        refused(code, tmp_path, word)


def test_damaged_files_are_named(tmp_path):
    prepared(tmp_path)
    file = tmp_path / "base" / "model.safetensors"
    whole = file.read_bytes()
    for content in (whole[:-10], whole[:20], b"", b"\xff" * 64, (2**60).to_bytes(8, "little") + whole[8:]):
        file.write_bytes(content)
        refused("GP641", tmp_path, "model.safetensors")
    file.unlink()
    refused("GP641", tmp_path, "no safetensors")
    (tmp_path / "base" / "pytorch_model.bin").write_bytes(b"")
    refused("GP641", tmp_path, "pytorch_model.bin", "safe_serialization")
    refused("GP641", tmp_path, base="nowhere")
    (tmp_path / "base" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../etc/passwd"}}')
    refused("GP641", tmp_path, "no file beside it")
    (tmp_path / "base" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "a.safetensors"}}')
    refused("GP641", tmp_path, "not there")
    (tmp_path / "base" / "model.safetensors.index.json").write_text("[]")
    refused("GP641", tmp_path, "weight_map")


def test_adapters_that_are_none_or_cannot_be_merged(tmp_path):
    prepared(tmp_path)
    refused("GP601", tmp_path, adapter="base")
    for text in (
        "patch lm_head with lora(rank=2)\npatch embed_tokens with scale.output(2)\nfreeze ** except @new",
        "patch lm_head with lora(rank=2)\npatch :Dropout with set(p=0.5)\nfreeze ** except @new",
    ):
        graphpatch.save_adapter(patch(lm(), text), tmp_path / "other")
        refused("GP644", tmp_path, text.rpartition("with ")[2].partition("(")[0], adapter="other")


# ── nothing half done ──


def test_a_full_disk_is_said_before_anything_is_written(tmp_path, monkeypatch):
    prepared(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    refused("GP646", tmp_path, "GiB left")


@posix
def test_writing_that_fails_half_way_leaves_nothing(tmp_path):
    import resource

    prepared(tmp_path, dtype=torch.float32)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
            refused("GP646", tmp_path, "cannot be written", "too large")
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0


@posix
def test_killed_at_any_operation_there_is_all_or_nothing(tmp_path):
    merged = prepared(tmp_path)
    (tmp_path / "base" / "config.json").write_text("{}")
    left = 0
    for kill_at in range(1, 400, 3):
        if not killed(tmp_path, kill_at):
            break
        if (tmp_path / "out").exists():
            assert same(read(tmp_path / "out"), merged) and (tmp_path / "out" / "config.json").exists()
            shutil.rmtree(tmp_path / "out")
        left += (tmp_path / ".out.partial").exists()
    assert left > 3
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert same(merge(tmp_path), merged)
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base", "out"]


def killed(folder: Path, at: int) -> bool:
    child = os.fork()
    if child == 0:
        count = 0

        def hook(event, args):
            nonlocal count
            if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.listdir"):
                count += 1
                if count == at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        try:
            graphpatch.merge_checkpoint(folder / "base", folder / "adapter", folder / "out")
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def test_interrupted_it_leaves_nothing(tmp_path, monkeypatch):
    prepared(tmp_path)

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(writing, "not_finite", interrupt)
    with pytest.raises(KeyboardInterrupt):
        merge(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base"]


@posix
def test_two_runs_into_one_name_do_not_meet(tmp_path):
    from fcntl import LOCK_EX, flock

    prepared(tmp_path)
    (tmp_path / ".out.partial").mkdir()
    number = os.open(tmp_path / ".out.partial", os.O_RDONLY)
    flock(number, LOCK_EX)
    refused("GP646", tmp_path, "another run")
    os.close(number)
    merge(tmp_path)


def test_out_may_lie_in_the_base(tmp_path):
    merged = prepared(tmp_path)
    graphpatch.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "base" / "deep" / "merged")
    assert same(read(tmp_path / "base" / "deep" / "merged"), merged)
    assert os.listdir(tmp_path / "base" / "deep" / "merged") == ["model.safetensors"]


# ── the command ──


def test_the_command(tmp_path, capsys):
    merged = prepared(tmp_path)
    paths = [str(tmp_path / name) for name in ("base", "adapter", "out")]
    assert main(["merge", *paths]) == 0
    assert "written to" in capsys.readouterr().err and same(read(tmp_path / "out"), merged)
    assert main(["merge", *paths]) == 2
    assert "GP646" in capsys.readouterr().err
    assert main(["merge", *paths[:2], str(tmp_path / "third"), "-q", "--sync"]) == 0
    assert same(read(tmp_path / "third"), merged)
    assert capsys.readouterr().err == ""


def test_progress_counts_every_byte(tmp_path):
    prepared(tmp_path)
    seen: list[tuple[int, int]] = []
    graphpatch.merge_checkpoint(
        tmp_path / "base", tmp_path / "adapter", tmp_path / "out", progress=lambda *a: seen.append(a)
    )
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert seen[-1] == (size, size) and [done for done, _ in seen] == sorted(done for done, _ in seen)
